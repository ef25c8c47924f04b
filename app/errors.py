"""Every way in which a request can fail, as an answer in OpenAI's error shape: one table."""

import math
from collections.abc import Callable
from typing import Any

import orjson
from flask import Flask, Response, g, has_request_context, request
from werkzeug.exceptions import HTTPException

from app.text.errors import (
    ClientGone,
    DeadlineExceeded,
    JobFailed,
    PoolUnavailable,
    ReaderTooSlow,
    RequestError,
    ShuttingDown,
)
from config import logs

log = logs.logger("tailrace.app")

INVALID = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
UNAVAILABLE = "service_unavailable_error"
SERVER = "server_error"

# nginx's word for a client that closed the connection; nobody reads it but the access log.
CLIENT_CLOSED_REQUEST = 499


class ApiError(Exception):
    """An error answer. ``retry_after`` is in seconds; ``should_retry`` False tells openai's client to give up."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.should_retry = should_retry

    def body(self) -> dict[str, Any]:
        """The error object, all four keys always there."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The error object as JSON."""
        return orjson.dumps(self.body())

    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.should_retry is not None:
            headers["X-Should-Retry"] = "true" if self.should_retry else "false"
        return headers

    def response(self) -> Response:
        """The answer to the current request, before any byte of another one was sent."""
        if has_request_context():
            return as_answer(self, request.path, g.get("request_id", ""))
        return self.openai_response()

    def openai_response(self) -> Response:
        """The answer in OpenAI's shape."""
        return Response(self.encoded(), self.status, self.headers(), mimetype="application/json")


Shape = Callable[[ApiError, str], Response]

# Path -> how errors look there and below, where they are not OpenAI's.
_SHAPES: dict[str, Shape] = {}


def register_shape(prefix: str, shape: Shape) -> None:
    """Let ``shape`` make the answers, of error and request id, at or below the path ``prefix``, wrong methods' too."""
    _SHAPES[prefix] = shape


def as_answer(error: ApiError, path: str, request_id: str) -> Response:
    """Return the error in the shape that the clients of the resource at ``path`` understand."""
    for prefix, shape in _SHAPES.items():
        if path == prefix or path.startswith(prefix + "/"):
            return shape(error, request_id)
    return error.openai_response()


def invalid(message: str, param: str | None = None) -> ApiError:
    """A 400 for the field ``param``."""
    return ApiError(400, message, param=param)


def as_api_error(error: BaseException) -> ApiError:
    """Return the answer for any exception; what is not in the table is a fault of ours, and no detail gets out."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, error.message, param=error.param, code=error.code)
        case PoolUnavailable():
            return ApiError(503, error.message, kind=UNAVAILABLE, retry_after=error.retry_after)
        case JobFailed():
            return _from_failure(error)
        case DeadlineExceeded(started=False):
            return ApiError(429, "The request waited too long for its turn.", kind=RATE_LIMIT, retry_after=5)
        case DeadlineExceeded():
            return ApiError(
                503, "The request took longer than it may.", kind=UNAVAILABLE, code="timeout", should_retry=False
            )
        case ReaderTooSlow():
            return ApiError(500, "The client reads too slowly.", kind=SERVER, should_retry=False)
        case ShuttingDown():
            return ApiError(503, "The server is shutting down; retry the request.", kind=UNAVAILABLE, retry_after=5)
        case HTTPException():
            return _from_http_exception(error)
    return ApiError(500, "The server had an error while processing the request.", kind=SERVER)


def _from_failure(error: JobFailed) -> ApiError:
    failure = error.failure
    match failure.kind:
        case "invalid":
            return ApiError(400, failure.message, param=error.param)
        case "overloaded":
            return ApiError(429, failure.message, kind=RATE_LIMIT, retry_after=failure.retry_after or 1)
        case "unavailable":
            return ApiError(503, failure.message, kind=UNAVAILABLE, retry_after=failure.retry_after or 2)
        case "internal":
            return ApiError(500, failure.message, kind=SERVER, should_retry=False)


def _from_http_exception(error: HTTPException) -> ApiError:
    status = error.code or 500
    if status >= 500:
        return ApiError(status, "The server had an error while processing the request.", kind=SERVER)
    messages = {
        404: "There is no such URL here.",
        405: "This URL does not know this method.",
        413: "The request body is too large.",
        415: "The request body must be application/json.",
    }
    return ApiError(status, messages.get(status, "The request could not be understood."))


def register_error_handlers(app: Flask) -> None:
    """Answer everything that goes wrong in ``app`` as JSON."""

    def handle(error: Exception) -> Response:
        if isinstance(error, ClientGone):
            return Response(status=CLIENT_CLOSED_REQUEST)
        answer = as_api_error(error)
        if answer.status == 500 and not isinstance(error, ApiError | JobFailed | ReaderTooSlow | HTTPException):
            log.error("unexpected error while answering a request", exc_info=error)
        response = answer.response()
        if isinstance(error, HTTPException):
            allow = dict(error.get_headers()).get("Allow")
            if allow:
                response.headers["Allow"] = allow
        return response

    app.register_error_handler(Exception, handle)
    app.register_error_handler(HTTPException, handle)
