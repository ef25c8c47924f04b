"""The keys that open the door, and what a request shows of its own."""

import base64
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from app.errors import ApiError
from config import logs
from config.keys import ApiKey, KeyLimits, check_keys, digest, parse_flag, read_file

log = logs.logger("tailrace.door")

# How often the file is looked at, and how long it must have been left alone: an editor may write it in pieces.
LOOK_S = 1.0
_IN_URL = frozenset({"api_key", "api-key", "apikey", "key", "access_token", "token"})

# What people open in a browser, which can ask them for a key as for a password and in no other way. All of it only
# tells something, so that it does no harm that a browser sends a password by itself.
PAGES = frozenset({"/status", "/status/data", "/status/page.js", "/status/page.css", "/docs", "/openapi.json"})
_PASSWORD = 'Basic realm="Tailrace: a key as password, any name", charset="UTF-8"'


@dataclass(frozen=True, slots=True)
class _State:
    """What is known of the file: which one it is, and since when we know."""

    signature: tuple[int, ...] | None
    seen_at: float


class Keyring:
    """All keys, as digests: those of the settings, and those of a file, which is read again when it changes."""

    def __init__(
        self,
        sealed: Sequence[str],
        file: Path | None = None,
        defaults: KeyLimits = KeyLimits(),  # noqa: B008 - it is frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = [parse_flag(each) for each in sealed]
        self._file = file
        self._defaults = defaults
        self._clock = clock
        self._keys: list[tuple[bytes, str]] = []
        self._limits: dict[str, KeyLimits] = {}
        self._next_look = 0.0
        self._read: tuple[int, ...] | None = None
        self._state = _State(None, 0.0)
        self._take([])
        if file is not None:
            self._read_again(_signature(file))
            self._next_look = clock() + LOOK_S

    def owner(self, key: bytes) -> str | None:
        """Return the name of the key's owner, or None. Takes the same time for every key, right or wrong."""
        if self._file is not None and self._clock() >= self._next_look:
            self._look()
        shown = digest(key)
        owner = None
        for known, name in self._keys:
            if compare_digest(known, shown):
                owner = name
        return owner

    def limits(self, owner: str) -> KeyLimits:
        """Return what ``owner`` may take; 0 stands for no limit."""
        return self._limits.get(owner, self._defaults)

    def _look(self) -> None:
        assert self._file is not None
        now = self._clock()
        self._next_look = now + LOOK_S
        signature = _signature(self._file)
        if signature == self._read:
            return
        seen = self._state.signature == signature and now - self._state.seen_at >= LOOK_S
        if self._state.signature != signature:
            self._state = _State(signature, now)
        if seen or signature is None or abs(time.time() - signature[0] / 1e9) > LOOK_S:
            self._read_again(signature)

    def _read_again(self, signature: tuple[int, ...] | None) -> None:
        """Take the file's keys; one that cannot be used changes nothing, and is told once."""
        assert self._file is not None
        self._read = signature
        try:
            found = read_file(self._file)
            check_keys([*self._given, *found])
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            log.error("the key file cannot be used, the keys stay as they were", reason=str(reason))
            return
        before = len(self._keys)
        self._take(found)
        log.info("keys changed", keys=len(self._keys), before=before)

    def _take(self, found: list[ApiKey]) -> None:
        every = [*self._given, *found]
        self._keys = [(key.digest, key.name) for key in every]
        self._limits = {
            key.name: KeyLimits(
                _first(key.limits.concurrent, self._defaults.concurrent),
                _first(key.limits.requests_per_minute, self._defaults.requests_per_minute),
                _first(key.limits.tokens_per_minute, self._defaults.tokens_per_minute),
            )
            for key in sorted(every, key=lambda key: key.limits != KeyLimits())
        }


def shown_key(environ: dict[str, Any]) -> bytes:
    """Return the key that a request shows. Raises `ApiError` 401 if it shows none, or not as it should.

    A second header of the same name has been joined to the first with a comma, which no key has.
    """
    authorization = environ.get("HTTP_AUTHORIZATION")
    if authorization is None:
        key: str = environ.get("HTTP_X_API_KEY", "")
        if not key:
            raise _missing(environ.get("QUERY_STRING", ""))
    else:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "basic" and _is_page(environ):
            return _password(key)
        if scheme.lower() != "bearer" or not key:
            raise refused("The Authorization header must be: Bearer YOUR_KEY.")
    # WSGI's strings are bytes in disguise.
    return key.encode("latin-1", "replace")


def challenge(environ: dict[str, Any]) -> dict[str, list[str]]:
    """Return the header that says how to show a key, once for each way: browsers read only the first way of a line."""
    return {"WWW-Authenticate": ["Bearer", _PASSWORD] if _is_page(environ) else ["Bearer"]}


def _is_page(environ: dict[str, Any]) -> bool:
    return environ.get("REQUEST_METHOD") == "GET" and environ.get("PATH_INFO") in PAGES


def _password(credentials: str) -> bytes:
    """Return the password of Basic credentials; the name before it may be any. Raises `ApiError` 401."""
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True)
    except ValueError:
        decoded = b""
    _, _, password = decoded.partition(b":")
    if not password:
        raise refused("The key is the password; the name may be any.")
    return password


def refused(message: str) -> ApiError:
    """A 401."""
    return ApiError(401, message, code="invalid_api_key")


def wrong_key() -> ApiError:
    """The answer to a key that nobody has."""
    return refused("Incorrect API key provided.")


def _missing(query: str) -> ApiError:
    if any(name.lower() in _IN_URL for name, _ in parse_qsl(query[:4096], keep_blank_values=True)):
        return refused(
            "An API key is not taken from the URL, which ends up in logs: send Authorization: Bearer YOUR_KEY."
        )
    return refused("You did not provide an API key: send Authorization: Bearer YOUR_KEY.")


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does; the first number is when it did, in nanoseconds since 1970."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a path's own stat takes twice as long
    except OSError:
        return None
    return found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _first(own: int | None, default: int | None) -> int:
    return own if own is not None else default or 0
