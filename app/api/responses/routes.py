"""/v1/responses: create, retrieve, stream again, cancel, delete, list the input."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, current_app, request

from app.api import sse
from app.api.disconnect import ClientGuard, WatchedBody
from app.api.keeping import Keeping, Shelf, is_to_be_kept, most_of_conversation, store, store_errors
from app.api.pages import PageQuery, query
from app.api.reference.answers.responses import ItemList, ResponseEvent, ResponseObject
from app.api.reference.answers.stored import Deleted
from app.api.reference.describe import PAGE, Parameter, describes
from app.api.responses.conversations import KIND, conversation_of, read_conversation
from app.api.responses.output import Draft
from app.api.responses.reader import EventReader
from app.api.responses.running import Run, answer_once, answer_streaming, background_work, work_in_background
from app.api.responses.schemas import LOGPROBS, ResponseRequest
from app.api.responses.start import response_head, start
from app.api.responses.translation import Said, translate
from app.api.service import guarded_stream, json_answer, parse, service, tenant_salt
from app.errors import invalid
from app.ids import new_id
from app.pool_stream import Stream
from app.store.record import Record
from app.text.errors import ClientGone

blueprint = Blueprint("responses", __name__)

_SHELF = Shelf(KIND, "Response", "response_id")


@blueprint.post("/v1/responses")
@describes(
    tag="responses",
    request=ResponseRequest,
    answer=ResponseObject,
    events=ResponseEvent,
    example={"input": "What is the capital of France?", "max_output_tokens": 32},
)
def create_response() -> Response:
    """Answer a conversation."""
    body = parse(ResponseRequest)
    kept = is_to_be_kept(body.store, default=True)
    if body.background and not kept:
        raise invalid("This server stores nothing, which background: true needs.", "background")
    said, own = read_conversation(body)
    response_id = new_id("resp_")
    if not body.background:
        return _answer(body, said, own, response_id, guarded_stream(), kept)
    stream = service().open_stream()
    try:
        return _answer(body, said, own, response_id, stream, kept)
    except BaseException:
        service().close_stream(stream)
        raise


def _answer(
    body: ResponseRequest, said: Sequence[Said], own: Sequence[dict[str, Any]], response_id: str, stream: Stream,
    kept: bool,
) -> Response:  # fmt: skip
    translation = translate(body, said)
    turn = start(body, translation, response_id, stream)
    head = response_head(body, turn, kept)
    head["status"] = "queued" if body.background else "in_progress"
    top = (body.top_logprobs or 0) if body.wants_logprobs else None
    draft = Draft(head, turn, streamed=bool(body.stream), top_logprobs=top)
    keeping = Keeping(store() if kept else None, response_id)
    run = Run(turn, draft, keeping, translation, stream)
    if kept:
        record = Record(
            id=response_id,
            kind=KIND,
            tenant=tenant_salt(),
            model=turn.name,
            status=head["status"],
            body=draft.body(),
            input=own,
            metadata=body.metadata or {},
            previous=body.previous_response_id,
            items=[item["id"] for item in own],
        )
        with store_errors():
            store().add(record, running=True)
    if not body.background:
        return answer_streaming(run) if body.stream else answer_once(run)
    draft.announce("queued", "response.created", "response.queued")
    run.unwritten = draft.drain()
    first = {**draft.body()}
    work_in_background(run, stream, store())
    return _event_stream(response_id, -1) if body.stream else json_answer(first)


@blueprint.get("/v1/responses/<response_id>")
@describes(
    tag="responses",
    answer=ResponseObject,
    events=ResponseEvent,
    parameters=[
        Parameter("stream", "true: the events of a background response", {"enum": ["true", "false"]}),
        Parameter("starting_after", "the number of an event; only those behind it", {"type": "integer", "minimum": 0}),
        Parameter("include", f"{LOGPROBS}; others are refused", {"const": LOGPROBS}),
    ],
)
def retrieve_response(response_id: str) -> Response:
    """A stored response, or its events."""
    given = query("stream", "starting_after", "include", "include_obfuscation")
    _check_include()
    record = _SHELF.get(response_id)
    streamed = given.get("stream", "false").lower()
    if streamed not in ("true", "false"):
        raise invalid("stream must be true or false.", "stream")
    after = given.get("starting_after")
    if streamed == "false":
        if after is not None:
            raise invalid("starting_after is only allowed with stream=true.", "starting_after")
        return json_answer(record.body)
    if after is not None and not (after.isascii() and after.isdigit() and len(after) < 16):
        raise invalid("starting_after must be the number of an event.", "starting_after")
    with store_errors():
        has_events = bool(store().events(response_id, -1, 1)) or record.is_running
    if not record.body.get("background") or not has_events:
        raise invalid("Only a background response that was created with stream: true can be streamed again.", "stream")
    return _event_stream(response_id, -1 if after is None else int(after))


@blueprint.delete("/v1/responses/<response_id>")
@describes(tag="responses", answer=Deleted)
def delete_response(response_id: str) -> Response:
    """Forget a response; one that is on its way is cancelled."""
    query()
    _SHELF.delete(response_id)
    _abort(response_id)
    return json_answer({"id": response_id, "object": "response", "deleted": True})


@blueprint.post("/v1/responses/<response_id>/cancel")
@describes(tag="responses", answer=ResponseObject)
def cancel_response(response_id: str) -> Response:
    """Cancel a background response; one that has ended stays as it is."""
    query()

    def cancelled(record: Record) -> Record:
        if not record.body.get("background"):
            raise invalid("Only a background response can be cancelled.", "response_id")
        if not record.is_running:
            return record
        return replace(record, status="cancelled", body={**record.body, "status": "cancelled"})

    record = _SHELF.amend(response_id, cancelled)
    if record.status == "cancelled":
        # Another process's work on it ends when that looks at the store the next time.
        _abort(response_id)
    return json_answer(record.body)


@blueprint.get("/v1/responses/<response_id>/input_items")
@describes(tag="responses", answer=ItemList, parameters=PAGE)
def list_input_items(response_id: str) -> Response:
    """All that the model read for this response, that of earlier responses included; the latest first."""
    given = query("limit", "order", "after", "include")
    _check_include()
    asked = PageQuery.read(given, "desc")
    _SHELF.get(response_id)
    with store_errors("response_id"):
        records = store().chain(KIND, tenant_salt(), response_id, most_of_conversation())
    if records is None:
        raise _SHELF.missing(response_id)
    return json_answer(asked.page([*conversation_of(records[:-1]), *records[-1].input], "items"))


def _check_include() -> None:
    for place, name in enumerate(request.args.getlist("include") + request.args.getlist("include[]")):
        if name != LOGPROBS:
            raise invalid(f"This server does not support include: {name[:64]!r}.", f"include[{place}]")


def _abort(response_id: str) -> None:
    stream = background_work(current_app.extensions).get(response_id)
    if stream is not None:
        stream.abort(ClientGone())


# --- the events of a background response


def _event_stream(response_id: str, after: int) -> Response:
    settings = service().settings
    guard = ClientGuard(request.environ, lambda: None, settings.send_timeout_s)
    reader = EventReader(store(), tenant_salt(), response_id, after)
    parts = reader.parts(settings.keepalive_comment_s or None, lambda: guard.gone)
    return sse.event_stream_response(WatchedBody(parts, guard))  # type: ignore[arg-type]
