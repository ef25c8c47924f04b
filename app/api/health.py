"""Health: alive is this process, ready is "a token can be produced now", asked of the pool at that moment."""

from typing import Any

import msgspec
from flask import Blueprint, Response

from app.api.reference.answers.service import Alive, Health, Readiness
from app.api.reference.describe import describes
from app.api.service import json_answer, loading_message, service
from workers.messages import PoolStatus, Stats, WorkerStatus

blueprint = Blueprint("health", __name__)

# A pool that does not answer within this time is taken for hung.
ANSWER_TIMEOUT_S = 1.0
SECOND_LOOK_S = 0.5

_NOTHING_YET = Stats(steps=0, running=0, waiting=0, blocks_used=0, blocks_total=0)


@blueprint.get("/livez")
@describes(tag="health", answer=Alive)
def live() -> Response:
    """This process answers."""
    return json_answer({"status": "ok"})


@blueprint.get("/readyz")
@describes(tag="health", answer=Readiness, others={503: Readiness})
def ready() -> Response:
    """Whether a request would be answered now."""
    status = _ask()
    reason = problem(status)
    return _answer({"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}, reason)


@blueprint.get("/health")
@describes(tag="health", answer=Health, others={503: Health})
def health() -> Response:
    """The same, with each model worker."""
    status = _ask()
    reason = problem(status)
    body: dict[str, Any] = {"status": "ready" if reason is None else "not ready"}
    if reason is not None:
        body["reason"] = reason
    if status is not None:
        body |= {"queued": status.queued, "running": status.running, "draining": status.draining}
        body["workers"] = [_worker(worker) for worker in status.workers]
    return _answer(body, reason)


def _ask() -> PoolStatus | None:
    """Ask the pool now; None if it does not answer, or is not there."""
    pool = service().pool
    status = pool.query_status(ANSWER_TIMEOUT_S)
    # Late in a process, or on a machine, with too much to do is not hung: the answer may have come in the meantime.
    return status if status is not None or pool.status is None else pool.query_status(SECOND_LOOK_S)


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    """One model worker, flat: what the pool sees of it and what it says of itself."""
    body = msgspec.structs.asdict(worker)
    stats = body.pop("stats") or _NOTHING_YET
    return {**body, **msgspec.structs.asdict(stats)}


def problem(status: PoolStatus | None) -> str | None:
    """Why no token can be produced, or None."""
    owner = service()
    if owner.draining:
        return "The server is shutting down."
    if status is None:
        return "The model pool does not answer."
    if status.draining:
        return "The server is shutting down."
    if not status.ready:
        if status.card_path is None:
            return loading_message(status)
        return "No model worker is ready."
    if owner.models.current() is None:
        return owner.models.problem or "The model's card is being read."
    return None


def _answer(body: dict[str, Any], reason: str | None) -> Response:
    response = json_answer(body, 200 if reason is None else 503)
    response.headers["Cache-Control"] = "no-store"
    if reason is not None:
        response.headers["Retry-After"] = "2"
    return response
