"""Errors in Anthropic's shape."""

from typing import Any

import orjson
from flask import Response

from app.api.messages.translate import anthropic_name
from app.errors import ApiError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the error object; a field that is to blame is named at the beginning of the message."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    if error.code == "timeout":
        kind = "timeout_error"
    message = error.message
    if error.param is not None:
        name = anthropic_name(error.param)
        message = message.replace(error.param, name) if name != error.param else message
        if name not in message:
            message = f"{name}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def error_response(error: ApiError, request_id: str) -> Response:
    """Return the answer; its status is the same as on OpenAI's routes."""
    headers = {**error.headers(), "request-id": request_id}
    return Response(orjson.dumps(error_body(error, request_id)), error.status, headers, mimetype="application/json")
