"""Which web pages may call this server from a browser (cross-origin resource sharing); none, unless told otherwise."""

import re
from collections.abc import Sequence
from typing import Any

from werkzeug.datastructures import Headers

from app.errors import ApiError

_METHODS = "GET, POST, DELETE"
_EXPOSED = (
    "Retry-After, X-Should-Retry, X-Request-Id, request-id, X-Tailrace-Warnings, X-Tailrace-Stream, "
    "Idempotent-Replayed, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    "x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2048}")
_MAX_AGE_S = "600"
_LOCAL = re.compile(r"(localhost|[a-z0-9.-]+\.localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]+)?")


class Cors:
    """``origins`` may read our answers; "*": any may. No origin is ever told that it may send a user's credentials."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origins)

    def allows(self, origin: str) -> bool:
        """Whether pages of ``origin`` may call us."""
        return self._any or origin in self._origins

    def dress(self, headers: Headers, origin: str) -> None:
        """Add to an answer what the browser must know."""
        if not self._origins:
            return
        if not self._any:
            # A cache must not give one origin's answer to another, nor an answer to a request without origin.
            headers.add("Vary", "Origin")
        if origin and self.allows(origin):
            headers["Access-Control-Allow-Origin"] = "*" if self._any else origin
            headers["Access-Control-Expose-Headers"] = _EXPOSED

    def preflight(self, environ: dict[str, Any], origin: str) -> Headers | None:
        """Return the headers of the answer to a browser's question before its request; None if it is no such question.

        The question comes without a key, and its answer tells nothing of what is behind the door.
        """
        if environ["REQUEST_METHOD"] != "OPTIONS" or "HTTP_ACCESS_CONTROL_REQUEST_METHOD" not in environ:
            return None
        if not origin or not self.allows(origin):
            return None
        headers = Headers()
        headers["Access-Control-Allow-Methods"] = _METHODS
        asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        if _HEADER_NAMES.fullmatch(asked):
            headers["Access-Control-Allow-Headers"] = asked
        headers["Access-Control-Max-Age"] = _MAX_AGE_S
        return headers

    def refuse_foreign_page(self, environ: dict[str, Any], origin: str) -> None:
        """Raise `ApiError` 403 for a request that a page of another site makes a browser send.

        For a server without keys: the page could not read the answer, but would use the model. Reading requests are
        left alone, and so is what is no web site: pages of this machine, extensions of browsers and editors.
        """
        if not origin or environ["REQUEST_METHOD"] in ("GET", "HEAD", "OPTIONS") or self.allows(origin):
            return
        scheme, _, authority = origin.lower().partition("://")
        if scheme not in ("http", "https", "null") or _LOCAL.fullmatch(authority):
            return
        if authority != environ.get("HTTP_HOST", "").lower():
            raise ApiError(
                403,
                "Web pages of this origin may not call this server; its operator can allow it with --cors_origins.",
                code="origin_not_allowed",
            )
