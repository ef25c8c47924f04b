"""GET /v1/streams/{id}, and requests with Last-Event-ID: a kept request read again, from any of its events on."""

import re
from collections.abc import Callable

from flask import Blueprint, Response, g, request

from app.api.answers import answer_streaming
from app.api.kept import Ticket, attach
from app.api.pages import query
from app.api.reference.describe import Parameter, describes
from app.api.service import guarded_stream, service
from app.api.sse import Frames
from app.errors import ApiError, invalid
from app.pool_stream import Stream
from app.text.generation import Generation

blueprint = Blueprint("streams", __name__)

LAST_EVENT_HEADER = "Last-Event-ID"
_EVENT_ID = re.compile(r"([A-Za-z0-9_-]{1,64}):([0-9]{1,15})", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,15}", re.ASCII)

# What makes the stream of a kept request, of its ticket and a stream that reads it.
Reader = Callable[[Ticket, Stream], tuple[Generation, Frames]]

# By the route that the request came by.
_READERS: dict[str, Reader] = {}


def rereads(route: str) -> Callable[[Reader], Reader]:
    """Let a function make the streams of what ``route`` has kept."""

    def register(reader: Reader) -> Reader:
        _READERS[route] = reader
        return reader

    return register


@blueprint.get("/v1/streams/<stream_id>")
@describes(
    tag="streams",
    media_type="text/event-stream",
    parameters=[
        Parameter("starting_after", "the number of an event; only those behind it", {"type": "integer", "minimum": 0}),
        Parameter(LAST_EVENT_HEADER, "the id of an event; only those behind it", place="header"),
    ],
)
def read_stream(stream_id: str) -> Response:
    """The events of a request that is kept: all of them, or those behind one"""
    given = query("starting_after")
    after = given.get("starting_after", "0")
    if not _NUMBER.fullmatch(after):
        raise invalid("starting_after must be the number of an event.", "starting_after")
    last = _last_event()
    if last is not None and last[0] != stream_id:
        raise invalid(f"{LAST_EVENT_HEADER} is the id of another stream's event.", LAST_EVENT_HEADER)
    return _read(stream_id, int(after) if last is None else last[1])


def resumption(route: str) -> Response | None:
    """Return the answer to a request that says which event it has seen last; None if the present one does not.

    Its body is not looked at. Raises `ApiError` 400 and 404.
    """
    last = _last_event()
    return None if last is None else _read(*last, route)


def _last_event() -> tuple[str, int] | None:
    given = request.headers.get(LAST_EVENT_HEADER)
    if not given:
        return None
    found = _EVENT_ID.fullmatch(given)
    if found is None:
        raise invalid(f"{LAST_EVENT_HEADER} must be the id of an event of a stream.", LAST_EVENT_HEADER)
    return found[1], int(found[2])


def _read(stream_id: str, after: int, route: str | None = None) -> Response:
    service().require_model()
    stream = guarded_stream()
    ticket = attach(stream, stream_id)
    reader = None if ticket is None or route not in (None, ticket.route) else _READERS.get(ticket.route)
    if ticket is None or reader is None:
        raise ApiError(
            404,
            f"There is no stream {stream_id[:64]!r} to be read: it never was, was not resumable, or is over for long.",
            param="stream_id",
            code="stream_not_found",
        )
    g.warnings = list(ticket.warnings)
    return answer_streaming(*reader(ticket, stream), ticket.id, after)
