"""Requests that outlive their clients: which ones do, what makes their answers again, and who joins them."""

from hashlib import sha256
from typing import Any, TypeVar

import msgspec
import orjson
from flask import Response, g, request

from app.api.json_gate import parse_object
from app.api.schemas import validate
from app.api.service import KEY_HEADER, service, tenant_salt, warn
from app.api.values import ApiRequest
from app.door import visitor
from app.errors import UNAVAILABLE, ApiError, invalid
from app.ids import new_id
from app.pool_stream import Stream
from app.text.deadline import POOL_GRACE_S
from app.text.offload import off_hub_if_large
from workers.messages import Attach, GenerateJob, Keep

R = TypeVar("R", bound=ApiRequest)

REPLAYED_HEADER = "Idempotent-Replayed"
STREAM_HEADER = "X-Tailrace-Stream"
MAX_KEY = 255
# How long the pool may take to say whether it keeps a request.
_PATIENCE_S = 5.0
_TRIES = 3
# What is the same request is not asked for differently by how the answer is sent.
_OF_THE_WAY = ("stream", "stream_options", "resumable")


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What an admitted request is known by, and all that its answer depends on beside what the pool says.

    ``seconds``: the time that it may take; 0: any.
    ``route`` and ``body`` are what was asked, where it can be read again.
    """

    id: str
    created: int
    name: str
    jobs: list[GenerateJob]
    seconds: float
    thinking: bool | None = None
    grammar_param: str | None = None
    grammar_lines: dict[int, str] = {}
    warnings: list[str] = []
    route: str = ""
    body: bytes = b""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """The present request shall be kept, under its owner's ``key`` for it, if that is not empty."""

    route: str
    body: bytes
    key: str = ""
    digest: bytes = b""


def note_wish(route: str, resumable: bool | None) -> None:
    """Note whether the present request, whose body was read, is to be kept. Raises `ApiError` 400."""
    key = idempotency_key()
    if not key and not resumable:
        return
    if service().settings.resume_window_s <= 0:
        if resumable:
            raise invalid("This server keeps no requests; send resumable: false.", "resumable")
        warn([f"{KEY_HEADER} has no effect: this server keeps no requests."])
        return
    body = bytes(g.body)
    digest = off_hub_if_large(len(body), _digest, route, body) if key else b""
    g.wish = Wish(route=route, body=body, key=key, digest=digest)


def idempotency_key() -> str:
    """Return the request's own name for itself, "" without one. Raises `ApiError` 400."""
    key = request.headers.get(KEY_HEADER)
    if key is None:
        return ""
    if not 1 <= len(key) <= MAX_KEY or not all(" " <= character <= "~" for character in key):
        raise invalid(f"{KEY_HEADER} must be 1 to {MAX_KEY} printable ASCII characters.", KEY_HEADER)
    return key


def enter(stream: Stream, ticket: Ticket) -> tuple[Ticket, bool]:
    """Keep the request if that is wished; return what it is then, and whether it is the one that has its key already.

    Such a one is being read from its first event on; the jobs of any other are to be submitted. Raises `ApiError` 422
    if the key belongs to another request, and what the stream raises.
    """
    wish: Wish | None = g.get("wish")
    if wish is None:
        return ticket, False
    owner = tenant_salt()
    note = msgspec.msgpack.encode(msgspec.structs.replace(ticket, route=wish.route, body=wish.body))
    for _ in range(_TRIES):
        keep = Keep(
            id=ticket.id,
            owner=owner,
            jobs=len(ticket.jobs),
            # Who reads it finds its end by itself, and the queue says better when to come again: they go first.
            seconds=ticket.seconds + POOL_GRACE_S if ticket.seconds else 0.0,
            most=_most_of_owner(),
            key=wish.key,
            digest=wish.digest,
            note=note,
        )
        kept = stream.keep(keep, _PATIENCE_S)
        if kept.request == ticket.id:
            g.kept = ticket.id
            jobs = [msgspec.structs.replace(job, kept=ticket.id) for job in ticket.jobs]
            return msgspec.structs.replace(ticket, jobs=jobs), False
        if not kept.request:
            warn(["The server has no room to keep this request: it is answered once."])
            return ticket, False
        if kept.digest != wish.digest:
            raise ApiError(
                422,
                f"This {KEY_HEADER} was used for another request.",
                param=KEY_HEADER,
                code="idempotency_key_reused",
            )
        joined = attach(stream, kept.request)
        if joined is not None:
            g.replayed = True
            return joined, True
    raise ApiError(503, "The request with this key is just ending.", kind=UNAVAILABLE, retry_after=1)


def _most_of_owner() -> int:
    """Return how many requests the key's owner may have at a time, 0 for any number."""
    guest = visitor.current()
    account = guest.account if guest is not None else None
    return (account.limits.concurrent or 0) if account is not None else 0


def attach(stream: Stream, request_id: str) -> Ticket | None:
    """Read a kept request from its first event on; None if this client has none of this id.

    The jobs have ids under which their events come to this reader.
    """
    alias = new_id("read-")
    kept = stream.attach(Attach(alias=alias, request=request_id, owner=tenant_salt()), _PATIENCE_S)
    if not kept.request:
        return None
    ticket = off_hub_if_large(len(kept.note), msgspec.msgpack.Decoder(Ticket).decode, kept.note)
    jobs = [msgspec.structs.replace(job, id=alias + job.id[len(ticket.id) :]) for job in ticket.jobs]
    g.kept = ticket.id
    return msgspec.structs.replace(ticket, jobs=jobs)


def parse_again(schema: type[R], ticket: Ticket) -> R:
    """Return the request as it was checked when it came."""
    parsed, _ = off_hub_if_large(len(ticket.body), lambda: validate(schema, parse_object(ticket.body), False))
    return parsed


def dress(response: Response) -> Response:
    """Say in the headers how the answer is kept."""
    if "kept" in g:
        response.headers[STREAM_HEADER] = g.kept
    if "replayed" in g:
        response.headers[REPLAYED_HEADER] = "true"
    return response


def _digest(route: str, body: bytes) -> bytes:
    fields: dict[str, Any] = orjson.loads(body)
    for name in _OF_THE_WAY:
        fields.pop(name, None)
    return sha256(route.encode() + b"\n" + orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).digest()
