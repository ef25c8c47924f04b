"""The gate before pydantic: reads a body with limits and makes sure that it is one harmless JSON object.

orjson itself refuses what must not pass: other encodings than UTF-8, byte order marks, lone surrogates, NaN, Infinity
and numbers that overflow. The rest is counted here.
"""

import time
from typing import Any

import gevent
import orjson
from flask import Request
from werkzeug.wsgi import get_input_stream

from app.errors import ApiError, invalid
from app.text.errors import ClientGone
from app.text.offload import give_way

MAX_DEPTH = 64
MAX_KEYS = 10_000
MAX_ITEMS = 1_048_576
# Whoever sends faster than this (bytes per second) is not slow, however large the body.
SLOWEST_RATE = 16 * 1024
_READ_BYTES = 64 * 1024
_CONTAINERS = (dict, list)


class TooDeep(ApiError):
    """Nested more deeply than anything is read here."""

    def __init__(self) -> None:
        super().__init__(400, f"The request body is nested more than {MAX_DEPTH} levels deep.")


def read_body(request: Request, limit: int, timeout_s: float) -> bytearray:
    """Return the whole body, in one piece of memory that grew with it: a hundred large ones may be here at a time.

    Raises `ApiError` 413 beyond ``limit`` bytes, 415 for another media type, 408 for a body that is ``timeout_s``
    seconds behind one sent at `SLOWEST_RATE`.
    """
    _check_media_type(request)
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(limit)
    stream = get_input_stream(request.environ, safe_fallback=True)
    body = bytearray()
    begun = time.monotonic()
    timeout = gevent.Timeout.start_new(timeout_s)
    try:
        while data := stream.read(_READ_BYTES):
            if len(body) + len(data) > limit:
                raise _too_large(limit)
            body += data
            timeout.close()
            left = begun + timeout_s + len(body) / SLOWEST_RATE - time.monotonic()
            timeout = gevent.Timeout.start_new(max(left, 0.001))
            # A body that has arrived already is read without waiting, so nobody else would get a turn.
            give_way()
    except gevent.Timeout as expired:
        if expired is not timeout:
            raise
        raise ApiError(408, "The request body came too slowly.") from None
    except ApiError:
        raise
    except OSError:
        raise ClientGone from None
    except Exception:
        # gunicorn's parser found the chunked coding broken.
        raise invalid("The request body could not be read.") from None
    finally:
        timeout.close()
    return body


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in ``body``. Raises `ApiError` 400 for anything else."""
    # The parser holds up all threads while it works, so millions of tiny values are counted before it sees them.
    if body.count(b",") > MAX_ITEMS:
        raise invalid(f"The request body has more than {MAX_ITEMS} values.")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("depth limit exceeded"):
            raise TooDeep from None
        raise invalid(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    _check_limits(value)
    return value


def _check_media_type(request: Request) -> None:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "The request body must not be compressed.")
    if request.mimetype and request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise ApiError(415, "The request body must be application/json.")
    if request.mimetype_params.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "The request body must be UTF-8.")


def _check_limits(root: dict[str, Any]) -> None:
    """Depth, keys and items, level by level: no recursion, and little time for each of a million values."""
    level: list[Any] = [root]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise TooDeep
        below: list[Any] = []
        for node in level:
            if type(node) is dict:
                if len(node) > MAX_KEYS:
                    raise invalid(f"An object in the request body has more than {MAX_KEYS} keys.")
                node = node.values()
            elif len(node) > MAX_ITEMS:
                raise invalid(f"A list in the request body has more than {MAX_ITEMS} items.")
            below += [child for child in node if type(child) in _CONTAINERS]
        level = below


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.")
