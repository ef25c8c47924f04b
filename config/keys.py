"""API keys as an operator writes them: on the command line, in variables, in a file.

A key is turned into its SHA-256 digest where it is read, and only the digest goes on: into settings, variables and
processes. ``sha256:`` with 64 hexadecimal digits stands for the key that has this digest, so no key need be written
down at all.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path

from config.problems import PREFIX, ConfigError

VARIABLE = PREFIX + "API_KEY"
MAX_KEYS = 1000
MAX_FILE_BYTES = 1024 * 1024
_LONGEST_KEY = 512

_NAME = r"[A-Za-z][A-Za-z0-9._-]{0,63}"
_NAMED = re.compile(rf"({_NAME})=(.*[^=].*)")
_FILE_LINE = re.compile(rf"(?:({_NAME}):\s+)?(\S+)((?:\s+\S+)*)")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
# No comma, which joins two headers of one name; no blank, which ends a token.
_KEY = re.compile(r"[!-+\--~]+")


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What the holder of a key may take; None: as the settings say, 0: no limit."""

    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: its owner's name, its digest (32 bytes), and the owner's limits."""

    name: str
    digest: bytes
    limits: KeyLimits = KeyLimits()

    def sealed(self) -> str:
        """The key in a form that can be handed on without telling it."""
        return f"{self.name}=sha256:{self.digest.hex()}"


def digest(key: bytes) -> bytes:
    """Return what is kept of a key, 32 bytes."""
    return hashlib.sha256(key).digest()


def parse_flag(text: str) -> ApiKey:
    """Return the key of ``NAME=KEY`` or ``KEY``. Raises ValueError, which never quotes the key."""
    named = _NAMED.fullmatch(text)
    return _key(named[1], named[2]) if named else _key(None, text)


def parse_file(text: str) -> list[ApiKey]:
    """Return the keys of a file: on each line ``name: key``, or a key alone, then limits (``concurrent=4``).

    A name on several lines has several keys. Raises ValueError that names the line.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        try:
            match = _FILE_LINE.fullmatch(line)
            if match is None:
                raise ValueError("is no `name: key [limit=number ...]`")
            keys.append(_key(match[1], match[2], _limits(match[3].split())))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    check_keys(keys)
    return keys


def check_keys(keys: Iterable[ApiKey]) -> None:
    """Make sure that a key has one owner. Raises ValueError."""
    owners: dict[bytes, str] = {}
    limits: dict[str, KeyLimits] = {}
    for key in keys:
        owner = owners.setdefault(key.digest, key.name)
        if owner != key.name:
            raise ValueError(f"{owner!r} and {key.name!r} have the same key")
        if key.limits != KeyLimits() and limits.setdefault(key.name, key.limits) != key.limits:
            raise ValueError(f"the keys of {key.name!r} have different limits")
    if len(owners) > MAX_KEYS:
        raise ValueError(f"there are more than {MAX_KEYS} keys")


def read_file(path: Path) -> list[ApiKey]:
    """Return the keys in the file at ``path``. Raises OSError, and ValueError that names the line."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"is longer than {MAX_FILE_BYTES} bytes")
    try:
        return parse_file(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None


def check_file(path: Path) -> list[str]:
    """Return warnings about the key file. Raises `ConfigError` if it cannot be used."""
    try:
        keys = read_file(path)
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"--api_key_file: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--api_key_file: {path}: {error}") from None
    if not keys:
        raise ConfigError(f"--api_key_file: {path}: has no key; nobody could enter")
    notices = []
    if mode & 0o077 and os.name == "posix":
        notices.append(f"--api_key_file: {path}: other users may read it (mode {mode & 0o777:03o}); chmod 600")
    return notices


def seal(environ: MutableMapping[str, str]) -> bool:
    """Replace the keys in ``environ`` by their digests; return whether there were any.

    What is no key stays as it is, for `config.settings` to say so.
    """
    text = environ.get(VARIABLE)
    if not text:
        return False
    try:
        sealed = [parse_flag(each).sealed() for each in _listed(text)]
    except ValueError:
        return False
    told = json.dumps(sealed)
    if told == text:
        return False
    environ[VARIABLE] = told
    return True


def forget(environ: MutableMapping[str, str]) -> None:
    """For a process that opens no door: take the keys out of ``environ``, and so out of its children's."""
    environ.pop(VARIABLE, None)


def _listed(text: str) -> Iterator[str]:
    if text.lstrip().startswith("["):
        listed = json.loads(text)
        if not all(isinstance(each, str) for each in listed):
            raise ValueError
        yield from listed
    else:
        yield from (item.strip() for item in text.split(",") if item.strip())


def _key(name: str | None, text: str, limits: KeyLimits | None = None) -> ApiKey:
    given = _DIGEST.fullmatch(text)
    if given:
        value = bytes.fromhex(given[1])
    elif text.lower().startswith("sha256:"):
        raise ValueError("sha256: is followed by 64 hexadecimal digits")
    else:
        if not _KEY.fullmatch(text):
            raise ValueError("a key is made of ASCII letters, digits and signs, without blanks and commas")
        if len(text) > _LONGEST_KEY:
            raise ValueError(f"a key has at most {_LONGEST_KEY} characters")
        value = digest(text.encode())
    return ApiKey(name or f"key-{value.hex()[:8]}", value, limits or KeyLimits())


def _limits(words: list[str]) -> KeyLimits:
    known = [field.name for field in fields(KeyLimits)]
    values = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in known:
            raise ValueError(f"behind the key come limits, {', '.join(f'{each}=NUMBER' for each in known)}")
        if not number.isascii() or not number.isdigit() or len(number) > 12:
            raise ValueError(f"{name} is a number")
        values[name] = int(number)
    return KeyLimits(**values)
