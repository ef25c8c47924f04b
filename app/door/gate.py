"""The door: what every request passes before anything else of the application sees it.

Who may come in is decided by what the server's own router goes by (method and path, as gunicorn has decoded them) and
by nothing else that a client can write. It is decided before the body is read.
"""

from typing import Any
from wsgiref.types import WSGIEnvironment

from flask import Response

from app.door import keys, limits, visitor
from app.door.address import Addresses
from app.door.cors import Cors
from app.door.hosts import Hosts
from app.door.ledger import Account, Ledger
from app.door.request_id import request_id
from app.door.visitor import Visitor
from app.errors import ApiError, as_answer
from config import logs
from config.keys import KeyLimits
from config.runtime_dir import make_private
from config.settings import Settings

log = logs.logger("tailrace.door")

# For whoever watches over the service: they tell that it is alive, and ready, and nothing else.
OPEN_PATHS = frozenset({"/livez", "/readyz"})
VISITOR = "tailrace.visitor"
LEDGER_FILE = "door.ledger"


class Door:
    """Lets requests in, or answers them itself."""

    def __init__(self, settings: Settings) -> None:
        self._bad_keys_per_minute = settings.bad_keys_per_minute
        self._addresses = Addresses(settings.trusted_proxies)
        self._cors = Cors(settings.cors_origins)
        allowed = list(settings.allowed_hosts)
        if not allowed and (settings.has_keys or not settings.on_loopback):
            # A page whose name was rebound has no key; and who listens to the world knows under which names.
            allowed = ["*"]
        self._hosts = Hosts(allowed)
        self._keys: keys.Keyring | None = None
        self._ledger: Ledger | None = None
        if settings.has_keys:
            defaults = KeyLimits(
                settings.key_max_concurrent, settings.key_requests_per_minute, settings.key_tokens_per_minute
            )
            self._keys = keys.Keyring(settings.api_key, settings.api_key_file, defaults)
            make_private(settings.runtime_dir)
            self._ledger = Ledger(settings.runtime_dir / LEDGER_FILE)

    def look(self, environ: WSGIEnvironment) -> Response | None:
        """Return the answer for who must stay outside, or None. Either way there is a `Visitor` now (`guest_of`),
        and has to be told to `leave`.
        """
        guest = Visitor(
            request_id(environ.get("HTTP_X_REQUEST_ID", "")),
            self._addresses.client(environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")),
            environ.get("HTTP_ORIGIN", ""),
        )
        environ[VISITOR] = guest
        visitor.begin(guest)
        try:
            self._hosts.check(environ.get("HTTP_HOST", ""))
            if guest.origin:
                preflight = self._cors.preflight(environ, guest.origin)
                if preflight is not None:
                    return self.dress(Response(status=204, headers=preflight), guest)
            if self._keys is None:
                self._cors.refuse_foreign_page(environ, guest.origin)
            elif environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"] not in OPEN_PATHS:
                self._admit(environ, guest, self._keys)
        except ApiError as error:
            return self.refuse(error, environ)
        return None

    def refuse(self, error: ApiError, environ: WSGIEnvironment) -> Response:
        """Return the answer for who was let in, or not, and gets nothing but ``error``."""
        guest = guest_of(environ)
        answer = as_answer(error, environ["PATH_INFO"], guest.request_id)
        if error.status == 401:
            answer.headers.update(keys.challenge(environ))
        return self.dress(answer, guest)

    def dress(self, response: Response, guest: Visitor) -> Response:
        """Add the headers that every answer has."""
        headers = response.headers
        headers["X-Request-Id"] = guest.request_id
        headers["X-Content-Type-Options"] = "nosniff"
        if guest.account is not None:
            limits.dress(headers, guest.account)
        self._cors.dress(headers, guest.origin)
        return response

    def close(self) -> None:
        """Give back what this process holds."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _admit(self, environ: WSGIEnvironment, guest: Visitor, keyring: keys.Keyring) -> None:
        """Find the key's owner and book the request. Raises `ApiError` 401 and 429."""
        ledger = self._ledger
        assert ledger is not None
        shown = keys.shown_key(environ)
        seconds = ledger.blocked(guest.address, self._bad_keys_per_minute)
        if seconds:
            raise limits.too_many_wrong_keys(seconds)
        owner = keyring.owner(shown)
        if owner is None:
            if ledger.bad_key(guest.address, self._bad_keys_per_minute):
                log.warning("too many wrong keys: refused for now", address=guest.address)
            raise keys.wrong_key()
        account: Account | None = None
        granted = keyring.limits(owner)
        if granted.concurrent or granted.requests_per_minute or granted.tokens_per_minute:
            account = ledger.enter(owner, granted)
            guest.enter(owner, account, None if account.refusal else ledger)
            visitor.begin(guest)
            if account.refusal:
                raise limits.refusal(account)
        else:
            guest.enter(owner, None, None)
            visitor.begin(guest)


def guest_of(environ: dict[str, Any]) -> Visitor:
    """Return the visitor whom the door let in."""
    found: Visitor = environ[VISITOR]
    return found
