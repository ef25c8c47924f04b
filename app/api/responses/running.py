"""How a response is brought to its end: for a client that waits, for one that reads a stream, or in the background."""

import time
from collections.abc import Iterator
from typing import Any

import gevent
from flask import Response, current_app, g

from app.api import life, sse
from app.api.keeping import Keeping, store_errors
from app.api.responses.output import Draft, Event
from app.api.responses.translation import Translation
from app.api.service import Service, json_answer, service, warn
from app.api.turn import Turn
from app.door.visitor import staying
from app.errors import ApiError, as_api_error
from app.pool_stream import Stream
from app.store.store import Store
from app.text.errors import ClientGone, JobFailed, ReaderTooSlow

_RUNNING = "tailrace.background"
# How often a background response looks whether it was cancelled, and writes down its events.
_LOOK_S = 0.2


class Run:
    """One response on its way: the turn, its draft, and how it is kept."""

    def __init__(self, turn: Turn, draft: Draft, keeping: Keeping, translation: Translation, stream: Stream) -> None:
        self.id = turn.id
        self.turn = turn
        self.draft = draft
        self.keeping = keeping
        self.translation = translation
        self.stream = stream
        # Events of a background response that are not in the store yet.
        self.unwritten: list[Event] = []
        self._begun = time.monotonic()

    def explain(self, error: BaseException) -> ApiError:
        """Return the error for the client; a fault of ours is logged."""
        answer = self.translation.error(error) if isinstance(error, Exception) else as_api_error(error)
        if answer.status == 500:
            known = isinstance(error, JobFailed | ReaderTooSlow)
            life.failed_unexpectedly(self.id, error, known)
        return answer

    def give_up(self, error: BaseException) -> None:
        """Nobody waits for it any more, or something failed: keep how far it came."""
        if isinstance(error, ClientGone | GeneratorExit | gevent.GreenletExit):
            self.keeping.settle_surely(self.draft.cancel())
        else:
            self.keeping.settle_surely(self.draft.fail(as_api_error(error)))

    def log_end(self, outcome: str) -> None:
        """One line."""
        life.ended(self.id, self.stream, self.turn.generation, outcome, self._begun)


def answer_once(run: Run) -> Response:
    """Wait for the complete response."""
    outcome = "finished"
    try:
        for pieces in run.turn.generation.pieces():
            run.draft.take(pieces)
        body = run.draft.finish()
        warn(run.turn.generation.warnings)
        run.keeping.settle(body, run.draft.item_ids)
    except BaseException as error:
        outcome = life.outcome_of(error)
        run.give_up(error)
        if isinstance(error, Exception) and not isinstance(error, ClientGone):
            raise run.explain(error) from error
        raise
    finally:
        run.log_end(outcome)
    return json_answer(body)


def answer_streaming(run: Run) -> Response:
    """Return the event stream; from here on it owns what the request has."""
    owner = service()
    stream, guard = g.pop("stream"), g.pop("guard")
    run.draft.announce("in_progress", "response.created", "response.in_progress")
    parts = _events(run, owner.settings.keepalive_comment_s or None)

    def fail(error: ApiError) -> bytes:
        body = run.draft.fail(run.translation.error(error))
        run.keeping.settle_surely(body)
        run.draft.announce_end(body)
        return _joined(run.draft.drain())

    return sse.event_stream_response(_KeptStream(run, parts, fail, owner, stream, guard))


def _events(run: Run, tick_s: float | None) -> Iterator[bytes]:
    draft = run.draft
    yield _joined(draft.drain())
    for pieces in run.turn.generation.pieces(tick_s):
        if not pieces:
            if tick_s is not None:
                yield sse.comment(run.turn.generation)
            continue
        draft.take(pieces)
        if events := draft.drain():
            yield _joined(events)
    body = draft.finish()
    # Kept first: the next request may continue this response as soon as its end is seen.
    run.keeping.settle(body, draft.item_ids)
    draft.announce_end(body)
    yield _joined(draft.drain())


class _KeptStream(sse.EventStream):
    """An event stream whose response is kept even if the client leaves."""

    def __init__(self, run: Run, parts: Iterator[bytes], fail: Any, owner: Service, stream: Stream, guard: Any) -> None:
        super().__init__(run.id, parts, fail, owner, stream, guard, run.turn.generation)
        self._run = run

    def close(self) -> None:
        """End the request; a response that did not come to its end is kept as cancelled."""
        super().close()
        if not self._run.keeping.is_settled:
            self._run.keeping.settle_surely(self._run.draft.cancel())


# --- in the background


def background_work(extensions: dict[str, Any]) -> dict[str, Stream]:
    """The background responses that this process works on, by id."""
    return extensions.setdefault(_RUNNING, {})  # type: ignore[no-any-return]


def work_in_background(run: Run, stream: Stream, store: Store) -> None:
    """Go on with the response without its client."""
    own = background_work(current_app.extensions)
    own[run.id] = stream
    gevent.spawn(staying(_work), run, stream, store, service(), own)


def _work(run: Run, stream: Stream, store: Store, owner: Service, own: dict[str, Stream]) -> None:
    outcome = "failed"
    draft = run.draft
    try:
        outcome = _follow(run, store)
    except ClientGone:
        # A route of this process has cancelled or deleted it.
        outcome = "cancelled"
    except Exception as error:
        owner.meter.failed(error, stream)
        body = draft.fail(run.explain(error))
        draft.announce_end(body)
        run.keeping.settle_surely(body, [*run.unwritten, *draft.drain()])
    finally:
        owner.close_stream(stream)
        own.pop(run.id, None)
        run.log_end(outcome)


def _follow(run: Run, store: Store) -> str:
    """Take the response to its end; returns a word for the log. Raises what ends it otherwise."""
    draft, generation = run.draft, run.turn.generation
    working = False
    looked = time.monotonic()
    for pieces in generation.pieces(_LOOK_S):
        begins = generation.started and not working
        if begins:
            working = True
            draft.announce("in_progress", "response.in_progress")
        draft.take(pieces)
        if time.monotonic() - looked < _LOOK_S and not begins:
            continue
        looked = time.monotonic()
        run.unwritten += draft.drain()
        with store_errors():
            if begins:
                wanted = store.settle(run.id, {**draft.head, "output": []}, (), run.unwritten)
            else:
                wanted = store.add_events(run.id, run.unwritten)
        if not wanted:
            return "cancelled"
        run.unwritten = []
    body = draft.finish()
    draft.announce_end(body)
    run.unwritten += draft.drain()
    return "finished" if run.keeping.settle(body, draft.item_ids, run.unwritten) else "cancelled"


def _joined(events: list[Event]) -> bytes:
    return b"".join(event for _, event in events)
