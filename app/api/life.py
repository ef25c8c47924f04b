"""The life of a request in the log: accepted, first token, finished, cancelled or failed; one line for any other.

The lines of a request have its id and its key's owner in common (`config.log_lines`). ``id`` in "accepted" and in the
end is what the API, the pool and the model workers call it: the names of its jobs begin with it.
"""

import time
from typing import Any

from flask import Response, g, request
from gevent import GreenletExit

from app.door.visitor import carried
from app.metrics.causes import cancel_cause, failure_cause
from app.pool_stream import Stream
from app.text.errors import ClientGone
from app.text.generation import Generation
from config import logs

log = logs.logger("tailrace.requests")
errors = logs.logger("tailrace.app")

# What is asked for all the time by whoever watches over the service: at debug only.
_WATCHING = frozenset({"/livez", "/readyz", "/health", "/metrics", "/status", "/status/data"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})


def accepted(request_id: str, stream: Stream, generation: Generation) -> None:
    """The pool has taken it."""
    g.accepted = True
    log.info(
        "accepted",
        id=request_id,
        prompt_tokens=generation.usage.prompt_tokens,
        choices=generation.choices,
        route=_route(),
    )

    def first_token() -> None:
        log.info("first token", id=request_id, **_waits(stream))

    if stream.first_token_at:
        first_token()
    else:
        stream.on_first_token = carried(first_token)


def outcome_of(error: BaseException) -> str:
    """Return the word for a request that ends with ``error``."""
    return "cancelled" if isinstance(error, ClientGone | GeneratorExit | GreenletExit) else "failed"


def ended(request_id: str, stream: Stream, generation: Generation, outcome: str, begun: float) -> None:
    """It has come to its end; ``outcome`` is "finished", "cancelled" or "failed", ``begun`` of `time.monotonic`."""
    usage = generation.usage
    told: dict[str, Any] = {"id": request_id}
    if outcome == "failed":
        own = "internal" if generation.started else "queue_time"
        told["cause"] = cancel_cause(stream.error) or (failure_cause(stream) if stream.failed else own)
    elif outcome == "cancelled":
        told["cause"] = cancel_cause(stream.error) or "client_gone"
    elif generation.cut:
        told["cause"] = "deadline"
    told |= {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
    told |= {"completion_tokens": usage.completion_tokens, **_waits(stream), "seconds": time.monotonic() - begun}
    if stream.timings is None:
        # A kept request that is told again: its own life is another one.
        log.info("read again", how=outcome, **told)
    elif stream.goes_on and outcome == "cancelled":
        log.info("left behind", **told)
    else:
        log.info(outcome, **told)


def failed_unexpectedly(request_id: str, error: BaseException, known: bool) -> None:
    """A fault of ours, or, ``known``, one that was told us; the words of the latter are the pool's or our own."""
    if known:
        errors.error("request failed", id=request_id, reason=str(error))
    else:
        errors.error("request failed", id=request_id, kind=type(error).__name__, exc_info=error)


def answered(response: Response, begun: float) -> None:
    """Any request gets its answer: one line, if it has none of its own as something that was generated."""
    if g.get("accepted"):
        return
    route, status = _route(), response.status_code
    tell = log.debug if route in _WATCHING and status != 500 else log.info
    told = {"id": g.job} if "job" in g else {}
    method = request.method if request.method in _METHODS else "other"
    tell("answered", method=method, route=route, status=status, **told, seconds=time.monotonic() - begun)


def refused_at_door(method: str, status: int, known: bool) -> None:
    """The door has answered; of strangers, who may come in crowds, only at debug."""
    tell = log.info if known else log.debug
    tell("refused", method=method if method in _METHODS else "other", status=status)


def _route() -> str:
    """The template of the URL; what the client has put into it, or that it is none of ours, is its own business."""
    return request.url_rule.rule if request.url_rule is not None else "none"


def _waits(stream: Stream) -> dict[str, float]:
    """How long it waited in the queue and for its first token, as far as it came, in seconds."""
    waits = {"queued_s": stream.started_at, "ttft_s": stream.first_token_at}
    return {name: moment - stream.begun_at for name, moment in waits.items() if moment}
