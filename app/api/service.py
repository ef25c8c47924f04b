"""What every route of one application shares, and the steps that all of them take."""

import json
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import gevent
import orjson
from flask import Response, current_app, g, request

from app.api.disconnect import ClientGuard
from app.api.errors import UNAVAILABLE, ApiError, invalid
from app.api.json_gate import parse_object, read_body
from app.api.schemas import MAX_SEQUENCES, GenerationRequest, validate
from app.api.values import ApiRequest
from app.pool_client import PoolClient, Stream
from app.text.card import Model, ModelHolder
from app.text.errors import ClientGone, RequestError, ShuttingDown
from app.text.generation import Generation
from app.text.offload import off_hub_if_large
from app.text.prompts import Echo
from app.text.sampling import Plan, max_tokens_for, plan
from config.settings import Settings
from workers.messages import GenerateJob, PoolStatus

log = logging.getLogger("tailrace.requests")

R = TypeVar("R", bound=ApiRequest)

# How long a request waits for a connection to the pool, and for the model card, right after this process started.
POOL_PATIENCE_S = 1.0
CARD_PATIENCE_S = 5.0
# The pool refuses at once or not at all; a grammar is looked at by a model worker.
REFUSAL_PATIENCE_S = 0.05
GRAMMAR_PATIENCE_S = 2.0
_MAX_WARNING_HEADER = 1024
_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Service:
    """The application's state: settings, line to the pool, the model, requests being answered."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = ModelHolder()
        self.pool = PoolClient(settings.pool_socket, self.models.follow)
        self.draining = False
        self._streams: set[Stream] = set()

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
        """Cancel what is unfinished of it."""
        self._streams.discard(stream)
        stream.close()

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end those that are still open after ``seconds`` with an error. Never blocks.

        To be called when the server stops, with less time than it gives its requests, so that clients see a reason.
        """
        self.draining = True
        gevent.spawn_later(max(0.0, seconds), self._end_streams)

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


def new_id(prefix: str) -> str:
    """Return a fresh id: the prefix and 22 characters that cannot be mistaken for each other."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(22))


def parse(schema: type[R]) -> R:
    """Return the checked request; its unknown fields are noted for `finish_body` and the header. Raises `ApiError`."""
    settings = service().settings
    body = read_body(request, settings.max_body_bytes, settings.send_timeout_s)

    def check() -> tuple[R, list[str]]:
        return validate(schema, parse_object(body), settings.strict)

    parsed, unknown = off_hub_if_large(len(body), check)
    g.warnings = [f"Unknown field, ignored: {name}" for name in unknown]
    return parsed


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


def time_limit(asked: float | None) -> float:
    """Return the request's time in seconds: what it asked for, within what is allowed."""
    allowed = service().settings.request_timeout_s
    return allowed if asked is None else min(asked, allowed)


def engine_plan(body: GenerationRequest, model: Model, prompts: int = 1) -> Plan:
    """Return the engine's parameters. Raises `RequestError` and `ApiError`."""
    settled = plan(body.wishes(), model, service().settings.sampling_defaults)
    width = settled.beams.num_beams if settled.beams else settled.n
    if prompts * width > MAX_SEQUENCES:
        raise invalid(f"A request can have at most {MAX_SEQUENCES} sequences (prompts times choices).", "n")
    return settled


def start_generation(
    stream: Stream,
    request_id: str,
    body: GenerationRequest,
    model: Model,
    adapter: str,
    settled: Plan,
    prompts: Sequence[list[int]],
    param: str,
    echoes: Sequence[Echo] = (),
) -> Generation:
    """Hand the request's jobs to the pool. Raises whatever keeps it from being admitted."""
    logprobs, prompt_logprobs = wanted_scores(body, bool(echoes))
    grammar, grammar_param = body.grammar() or (None, None)
    jobs = []
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError("The prompt has no tokens.", param)
        jobs.append(
            GenerateJob(
                id=request_id if len(prompts) == 1 else f"{request_id}/{place}",
                prompt=prompt,
                max_tokens=max_tokens_for(settled, model, len(prompt), param),
                min_tokens=settled.min_tokens,
                n=settled.n,
                stop_token_ids=settled.stop_token_ids,
                sampling=settled.sampling,
                beams=settled.beams,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
                adapter=adapter,
                salt=tenant_salt(),
            )
        )
    generation = Generation(
        stream, model, jobs, body.stop, time_limit(body.timeout), echoes=echoes, grammar_param=grammar_param
    )
    generation.submit(REFUSAL_PATIENCE_S if grammar is None else GRAMMAR_PATIENCE_S)
    log.info(
        "accepted id=%s prompt_tokens=%d choices=%d", request_id, generation.usage.prompt_tokens, generation.choices
    )
    return generation


def wanted_scores(body: GenerationRequest, echo: bool) -> tuple[int | None, int | None]:
    """Return the engine's ``logprobs`` and ``prompt_logprobs``: what the client asks for and what we need ourselves."""
    logprobs, prompt_logprobs = body.top_alternatives, body.prompt_logprobs
    if echo and logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    if body.asked_max_tokens == 0 and prompt_logprobs is None:
        # An engine without anything to generate must have something to do.
        prompt_logprobs = 0
    if body.picks_best and logprobs is None:
        logprobs = 0
    return logprobs, prompt_logprobs


def tenant_salt() -> str:
    """Return what keeps this request's prompt apart from those of other tenants in the prefix cache.

    The one place where it is set. There are no API keys yet, so all requests are one tenant's.
    """
    return ""


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
