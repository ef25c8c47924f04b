"""Why a request was refused, was cancelled or failed: the words of the labels, from the errors of one table."""

from app.pool_stream import Stream
from app.text.errors import (
    ClientGone,
    DeadlineExceeded,
    JobFailed,
    PoolUnavailable,
    ReaderTooSlow,
    RequestError,
    ShuttingDown,
)
from workers.messages import Failed

_OF_FAILURES = {"invalid": "invalid", "overloaded": "queue_full", "unavailable": "unavailable"}


def refusal_cause(error: BaseException) -> str | None:
    """Return why a request was refused; None if it was not, but cancelled or failed.

    An answer of the API is judged by what it was made of, or by its status.
    """
    match error:
        case RequestError():
            return "invalid"
        case PoolUnavailable():
            return "unavailable"
        case ShuttingDown():
            return "shutdown"
        case DeadlineExceeded(started=False):
            return "queue_time"
        case JobFailed():
            return _of_failure(error.failure)
        case ClientGone() | DeadlineExceeded() | ReaderTooSlow():
            return None
    made_of = error.__cause__ and refusal_cause(error.__cause__)
    if made_of:
        return made_of
    status = getattr(error, "status", getattr(error, "code", None))
    if not isinstance(status, int):
        return None
    return {429: "key_limit", 503: "unavailable"}.get(status, "invalid" if 400 <= status < 500 else None)


def door_cause(status: int) -> str:
    """Return why the door let a request not in, by the status of its answer."""
    return {401: "key", 429: "key_limit", 403: "page", 503: "shutdown"}.get(status, "name")


def cancel_cause(error: BaseException | None) -> str | None:
    """Return what a stream was ended by, or None."""
    match error:
        case ClientGone():
            return "client_gone"
        case ReaderTooSlow():
            return "slow_reader"
        case ShuttingDown():
            return "shutdown"
    return None


def failure_cause(stream: Stream) -> str:
    """Return why a stream failed, of which something had begun."""
    failure = stream.failure
    if failure is None:
        return "unavailable"
    return failure.cause or ("internal" if failure.kind == "internal" else "unavailable")


def _of_failure(failure: Failed) -> str | None:
    if failure.cause == "grammar":
        return "invalid"
    return failure.cause or _OF_FAILURES.get(failure.kind)
