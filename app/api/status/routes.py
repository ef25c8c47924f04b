"""GET /status, its script and its style, and GET /status/data, what the page shows."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from flask import Blueprint, Response, request

from app.api.metrics import scene
from app.api.reference.answers.status import Status
from app.api.reference.describe import describes
from app.api.service import json_answer
from app.api.status.data import status_body

blueprint = Blueprint("status", __name__)

_FOLDER = Path(__file__).parent
# Nothing from elsewhere, nothing inline, no page around this one.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the page, as it is sent."""

    body: bytes
    content_type: str

    def response(self) -> Response:
        response = Response(self.body, content_type=self.content_type)
        response.set_etag(sha256(self.body).hexdigest()[:32])
        # The next version has other files under the same names.
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.make_conditional(request)
        return response


_PAGE = _File((_FOLDER / "page.html").read_bytes(), "text/html; charset=utf-8")
_SCRIPT = _File((_FOLDER / "page.js").read_bytes(), "text/javascript; charset=utf-8")
_STYLE = _File((_FOLDER / "page.css").read_bytes(), "text/css; charset=utf-8")


@blueprint.get("/status")
@describes(tag="health", media_type="text/html")
def page() -> Response:
    """A page for people: how the service is, as it changes."""
    return _PAGE.response()


@blueprint.get("/status/page.js")
@describes(tag="health", media_type="text/javascript")
def script() -> Response:
    """The script of that page."""
    return _SCRIPT.response()


@blueprint.get("/status/page.css")
@describes(tag="health", media_type="text/css")
def style() -> Response:
    """The style of that page."""
    return _STYLE.response()


@blueprint.get("/status/data")
@describes(tag="health", answer=Status)
def data() -> Response:
    """What that page shows: the state, and counters since the start, of all HTTP workers together."""
    response = json_answer(status_body(scene()))
    response.headers["Cache-Control"] = "no-store"
    return response
