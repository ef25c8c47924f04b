"""GET /openapi.json and /docs: the API described by itself. Both are made once, at the first use."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import orjson
from flask import Blueprint, Flask, Response, current_app, request

from app.api.reference.describe import describes
from app.api.reference.openapi import document
from app.api.reference.page import Page, page
from app.api.service import service
from app.text.offload import off_hub

blueprint = Blueprint("reference", __name__)

_EXTENSION = "tailrace.reference"


@dataclass(frozen=True, slots=True)
class Reference:
    """Both forms of the description, ready to be sent."""

    openapi: bytes
    page: Page


@blueprint.get("/openapi.json")
@describes(tag="reference", answer=dict)
def openapi() -> Response:
    """This description."""
    return _answer(lambda made: made.openapi, "application/json")


@blueprint.get("/docs")
@describes(tag="reference", media_type="text/html")
def docs() -> Response:
    """This description as a page for people."""
    response = _answer(lambda made: made.page.html, "text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = reference().page.policy
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def reference() -> Reference:
    """Return the current application's description."""
    extensions = current_app.extensions
    if _EXTENSION not in extensions:
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        settings = service().settings

        def make() -> Reference:
            described = document(app, settings)
            return Reference(orjson.dumps(described), page(described))

        extensions[_EXTENSION] = off_hub(make)
    return extensions[_EXTENSION]  # type: ignore[no-any-return]


def _answer(part: Callable[[Reference], bytes], content_type: str) -> Response:
    body = part(reference())
    response = Response(body, content_type=content_type)
    response.set_etag(sha256(body).hexdigest()[:32])
    # What it says changes with the settings, so a cache has to ask; without a change that costs nothing.
    response.headers["Cache-Control"] = "no-cache"
    response.make_conditional(request)
    return response
