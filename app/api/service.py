"""What every route of one application shares, and the steps that all of them take."""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gevent
import orjson
from flask import Response, current_app, g, request

from app.api.disconnect import ClientGuard
from app.api.json_gate import parse_object, read_body
from app.api.schemas import MAX_SEQUENCES, GenerationRequest, validate
from app.api.values import ApiRequest
from app.door import visitor
from app.door.gate import Door
from app.door.visitor import Reservation
from app.errors import UNAVAILABLE, ApiError, invalid
from app.metrics.meter import Meter
from app.pool_client import PoolClient
from app.pool_stream import Stream
from app.text.card import Model, ModelHolder
from app.text.deadline import Deadline
from app.text.errors import ClientGone, ShuttingDown
from app.text.generation import Generation
from app.text.offload import off_hub_if_large
from app.text.sampling import Plan, plan
from config.settings import Settings
from workers.messages import PoolStatus

R = TypeVar("R", bound=ApiRequest)

# How long a request waits for a connection to the pool, and for the model card, right after this process started.
POOL_PATIENCE_S = 1.0
CARD_PATIENCE_S = 5.0
_MAX_WARNING_HEADER = 1024
# Of unknown fields: so many are named, by so many characters.
MAX_UNKNOWN_TOLD = 32
_MAX_NAME_TOLD = 256
TIMEOUT_HEADER = "X-Request-Timeout"
KEY_HEADER = "Idempotency-Key"
_NUMBER = re.compile(r"[0-9.]{1,30}(e[+-]?[0-9]{1,3})?", re.ASCII | re.IGNORECASE)


class Service:
    """The application's state: settings, line to the pool, the model, requests being answered."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = ModelHolder()
        self.pool = PoolClient(settings.pool_socket, self.models.follow)
        self.door = Door(settings)
        self.meter = Meter(settings.runtime_dir, self.pool.timings, lambda: self.open_requests)
        self.draining = False
        self._streams: set[Stream] = set()
        # What to settle when a stream is closed: tokens taken beforehand, and what has been used.
        self._reservations: dict[Stream, list[tuple[Reservation, Callable[[], int]]]] = {}

    @property
    def open_requests(self) -> int:
        """Requests that are being answered by the pool."""
        return len(self._streams)

    def open_stream(self) -> Stream:
        """Return a stream that ends with an error when this process stops; give it back to `close_stream`."""
        if self.draining:
            raise ShuttingDown
        stream = self.pool.open_stream()
        self._streams.add(stream)
        return stream

    def close_stream(self, stream: Stream) -> None:
        """Cancel what is unfinished of it, and settle the tokens that were reserved for it."""
        if stream in self._streams:
            self.meter.ended(stream)
        self._streams.discard(stream)
        stream.close()
        for reservation, used in self._reservations.pop(stream, ()):
            reservation.settle(used())

    def reserve_tokens(self, stream: Stream, prompt_tokens: int, most: int, used: Callable[[], int]) -> None:
        """Take ``most`` tokens from what the key's owner has left; ``used`` tells at the end how many it were.

        Raises `ApiError` 429.
        """
        guest = visitor.current()
        reservation = guest.reserve(prompt_tokens, most) if guest is not None else None
        if reservation is not None:
            self._reservations.setdefault(stream, []).append((reservation, used))

    def reserve_prompts(self, stream: Stream, tokens: int) -> None:
        """The same for a request that only reads: it uses ``tokens``, or none if no model worker has begun."""
        self.reserve_tokens(stream, tokens, tokens, lambda: tokens if stream.started_at else 0)

    def drain(self) -> None:
        """Take no more requests, and end those that are still open with an error. Never blocks.

        To be called when the server stops, with less time than it gives its requests, so that clients see a reason.
        """
        self.draining = True
        gevent.spawn(self._end_streams)

    def _end_streams(self) -> None:
        for stream in list(self._streams):
            stream.abort(ShuttingDown())

    def require_model(self) -> Model:
        """Return the model. Raises `ApiError` 503 while it cannot be served."""
        if self.draining:
            raise ShuttingDown
        status = self.pool.wait_status(POOL_PATIENCE_S)
        if status is None:
            raise _unavailable("The model pool is not running.")
        if status.draining:
            raise _unavailable("The server is shutting down.")
        if status.card_path is None:
            raise _unavailable(loading_message(status))
        model = self.models.current(CARD_PATIENCE_S)
        if model is None:
            raise _unavailable(f"The model is not ready: {self.models.problem or 'its card is being read'}.")
        return model


def service() -> Service:
    """Return the current application's `Service`."""
    return current_app.extensions["tailrace"]  # type: ignore[no-any-return]


def loading_message(status: PoolStatus) -> str:
    """Say how far loading has come."""
    states = {worker.state for worker in status.workers}
    if states and states <= {"failed"}:
        return "No model worker could be started."
    progress = max((worker.progress for worker in status.workers), default=0.0)
    return f"The model is still loading ({progress:.0%})."


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind=UNAVAILABLE, retry_after=2)


def parse(schema: type[R]) -> R:
    """Return the checked request; its unknown fields and its text are noted in ``g``. Raises `ApiError`."""
    settings = service().settings
    body = read_body(request, settings.max_body_bytes, settings.receive_timeout_s)

    def check() -> tuple[R, list[str]]:
        return validate(schema, parse_object(body), settings.strict)

    parsed, unknown = off_hub_if_large(len(body), check)
    g.body = body
    g.warnings = _of_unknown(unknown)
    if KEY_HEADER in request.headers and "resumable" not in schema.model_fields:
        warn([f"{KEY_HEADER} has no effect here."])
    return parsed


def _of_unknown(names: Sequence[str]) -> list[str]:
    """Return the warnings of unknown fields: an answer must not become many times as large as what it answers."""
    told = [f"Unknown field, ignored: {_shortened(name)}" for name in names[:MAX_UNKNOWN_TOLD]]
    left = len(names) - len(told)
    return [*told, f"{left} more unknown fields, ignored"] if left else told


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME_TOLD else name[:_MAX_NAME_TOLD] + "..."


def resolve_model(asked: str | None) -> tuple[Model, str, str]:
    """Return the model, the name to answer with, and the adapter to use ("" for none).

    Raises `ApiError` 404 for an unknown name, 503 while there is no model.
    """
    model = service().require_model()
    if asked is None or asked == "":
        return model, model.card.id, ""
    if asked in model.names:
        return model, asked, ""
    if asked in model.card.adapters:
        return model, asked, asked
    raise model_not_found(asked)


def model_not_found(name: str) -> ApiError:
    """A 404 for a model name."""
    shown = name if len(name) <= 64 else name[:64] + "..."
    return ApiError(404, f"The model {json.dumps(shown)} does not exist.", param="model", code="model_not_found")


def guarded_stream() -> Stream:
    """Open a stream to the pool that is cancelled when the client leaves; it is closed with the answer."""
    owner = service()
    stream = owner.open_stream()
    g.stream = stream
    g.guard = ClientGuard(request.environ, lambda: stream.abort(ClientGone()), owner.settings.send_timeout_s)
    return stream


def deadline_of(asked: float | None) -> Deadline:
    """Return the end of the request's time: the shortest of what body, header and server allow.

    Raises `ApiError` 400 that names the header.
    """
    settings = service().settings
    limits = [settings.request_timeout_s, asked, _header_timeout()]
    return Deadline(min(each for each in limits if each is not None), settings.queue_timeout_s)


def _header_timeout() -> float | None:
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given) if _NUMBER.fullmatch(given) else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise invalid(f"{TIMEOUT_HEADER} must be a number of seconds above 0.", TIMEOUT_HEADER)
    return seconds


def engine_plan(body: GenerationRequest, model: Model, prompts: int = 1) -> Plan:
    """Return the engine's parameters. Raises `RequestError` and `ApiError`."""
    settled = plan(body.wishes(), model, service().settings.sampling_defaults)
    width = settled.beams.num_beams if settled.beams else settled.n
    if prompts * width > MAX_SEQUENCES:
        raise invalid(f"A request can have at most {MAX_SEQUENCES} sequences (prompts times choices).", "n")
    return settled


def tenant_salt() -> str:
    """Return what keeps this request's prompt apart from those of other tenants in the prefix cache.

    It is the name of the key's owner, and so the same for all keys of one owner, before and after a change of keys;
    without keys all requests are one tenant's. What is stored belongs to it too.
    """
    guest = visitor.current()
    return "" if guest is None else guest.owner


def usage_body(generation: Generation) -> dict[str, Any]:
    """The usage object of an answer."""
    usage = generation.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def json_answer(body: dict[str, Any], status: int = 200) -> Response:
    """Return a JSON answer, with the request's warnings if it has any."""
    warnings = g.get("warnings")
    if warnings:
        body = {**body, "warnings": warnings}
    return Response(orjson.dumps(body), status, mimetype="application/json")


def warn(warnings: Sequence[str]) -> None:
    """Add to the warnings of the current request."""
    if warnings:
        g.warnings = [*g.get("warnings", ()), *warnings]


def warnings_header() -> str | None:
    """The warnings in a form that fits into a header: ASCII, no line ends, bounded."""
    warnings = g.get("warnings")
    if not warnings:
        return None
    text = "; ".join(json.dumps(warning)[1:-1] for warning in warnings)
    return text if len(text) <= _MAX_WARNING_HEADER else text[:_MAX_WARNING_HEADER] + "..."


def now() -> int:
    """Seconds since 1970, as OpenAI's ``created``."""
    return int(time.time())
