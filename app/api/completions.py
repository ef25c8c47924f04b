"""POST /v1/completions"""

from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, g

from app.api import sse
from app.api.admission import continued, start_generation
from app.api.answers import answer_once, answer_streaming
from app.api.kept import Ticket, note_wish, parse_again
from app.api.logprobs import PromptScores, completion_logprobs
from app.api.reference.answers.completions import Completion, CompletionEvent
from app.api.reference.describe import describes
from app.api.schemas import CompletionRequest
from app.api.service import engine_plan, guarded_stream, parse, resolve_model, service, usage_body
from app.api.streams import rereads, resumption
from app.errors import invalid
from app.ids import new_id
from app.pool_stream import Stream
from app.text.card import Model
from app.text.errors import RequestError
from app.text.generation import Answer, Generation, Piece
from app.text.prompts import completion_prompt, echo_of, infill_prompt

blueprint = Blueprint("completions", __name__)

_ROUTE = "/v1/completions"


@blueprint.post(_ROUTE)
@describes(
    tag="completions",
    request=CompletionRequest,
    answer=Completion,
    events=CompletionEvent,
    example={"prompt": "The capital of France is", "max_tokens": 16, "template": "raw"},
)
def create_completion() -> Response:
    """Continue one or several prompts."""
    again = resumption(_ROUTE)
    if again is not None:
        return again
    body = parse(CompletionRequest)
    note_wish(_ROUTE, body.resumable)
    model, name, adapter = resolve_model(body.model)
    settled = engine_plan(body, model, len(body.prompt))
    if body.suffix and model.infill is not None and not body.ignore_eos:
        settled = replace(settled, stop_token_ids=sorted({*settled.stop_token_ids, *model.infill.ends}))
    stream = guarded_stream()
    prompts = prompt_tokens(body, model)
    echoes = [echo_of(model, *each) for each in zip(body.prompt, prompts, strict=True)] if body.echo else []
    generation, ticket = start_generation(
        stream, new_id("cmpl-"), body, model, name, adapter, settled, prompts, "prompt", echoes
    )
    if body.stream:
        return answer_streaming(generation, CompletionFrames(head(ticket), body, generation, model), ticket.id)
    return answer_once(
        generation,
        ticket.id,
        lambda answers: {**head(ticket), "choices": choices(answers, body, model), "usage": usage_body(generation)},
    )


@rereads(_ROUTE)
def read_again(ticket: Ticket, stream: Stream) -> tuple[Generation, sse.Frames]:
    """A kept completion, as a stream. Raises `ApiError` 400 for one that has no stream."""
    body = parse_again(CompletionRequest, ticket)
    if body.picks_best:
        raise invalid("A completion with best_of above n cannot be streamed.", "best_of")
    model = service().require_model()
    prompts = [job.prompt for job in ticket.jobs]
    echoes = [echo_of(model, *each) for each in zip(body.prompt, prompts, strict=True)] if body.echo else []
    generation = continued(stream, ticket, body, model, echoes)
    return generation, CompletionFrames(head(ticket), body, generation, model)


def head(ticket: Ticket) -> dict[str, Any]:
    """What all parts of an answer say."""
    return {"id": ticket.id, "object": "text_completion", "created": ticket.created, "model": ticket.name}


def prompt_tokens(body: CompletionRequest, model: Model) -> list[list[int]]:
    """Return the tokens of each prompt. Raises `RequestError` that names the bad one."""
    wrap = wraps_prompt(body, model)
    ids = []
    for place, prompt in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{place}]"
        if body.suffix:
            ids.append(infill_prompt(model, prompt, body.suffix, param=param))
        else:
            ids.append(completion_prompt(model, prompt, wrap=wrap, param=param))
    return ids


def wraps_prompt(body: CompletionRequest, model: Model) -> bool:
    """Whether texts go into the chat template, as the demo did it. Raises `RequestError` without one."""
    if body.echo or body.suffix:
        return False
    asked: str = body.template or "auto"
    if asked == "auto":
        asked = {"auto": "auto", "always": "chat", "never": "raw"}[service().settings.completion_template]
    if asked == "chat" and model.template is None:
        raise RequestError("This model has no chat template.", "template")
    return asked == "chat" or (asked == "auto" and model.template is not None)


def choices(answers: list[Answer], body: CompletionRequest, model: Model) -> list[dict[str, Any]]:
    """The choices of a complete answer."""
    prompt_scores = PromptScores(model, body.prompt_logprobs or 0)
    made = []
    for index, answer in enumerate(best(answers, body)):
        choice: dict[str, Any] = {
            "index": index,
            "text": answer.text,
            "logprobs": (
                None if body.logprobs is None else completion_logprobs(model.token_names, answer.tokens, body.logprobs)
            ),
            "finish_reason": answer.finish_reason,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(answer.prompt)
        made.append(choice)
    return made


def best(answers: list[Answer], body: CompletionRequest) -> list[Answer]:
    """Return the n most likely of each prompt's choices by the mean log-probability of a token, the best first."""
    if not body.picks_best:
        return answers
    chosen = []
    for first in range(0, len(answers), body.drawn):
        drawn = answers[first : first + body.drawn]
        chosen += sorted(drawn, key=lambda answer: answer.mean_logprob, reverse=True)[: body.n or 1]
    return chosen


class CompletionFrames(sse.OpenAIEnding):
    """The events of a streamed completion."""

    def __init__(self, head: dict[str, Any], body: CompletionRequest, generation: Generation, model: Model) -> None:
        self._head = head
        self._ids = sse.EventIds(head["id"])
        self._generation = generation
        self._include_usage = body.include_usage
        self._names = model.token_names
        self._top = body.logprobs or 0
        # None: the engine may tell them, but the client did not ask.
        self._prompt_scores = None if body.prompt_logprobs is None else PromptScores(model, body.prompt_logprobs)

    def opening(self, count: int) -> bytes:
        """Nothing but the headers, which a comment brings on their way; warnings come with no text of the first choice.

        Clients look at the first choice of every chunk but the one with the usage.
        """
        warnings = g.get("warnings")
        return self._ids.frame({**self._body(0, ""), "warnings": warnings}) if warnings else sse.KEEP_ALIVE

    def text(self, index: int) -> sse.TextFrame:
        """New text of choice ``index``."""
        return sse.TextFrame(self._ids, sse.frame(self._body(index, sse.TextFrame.SLOT)))

    def scored(self, piece: Piece) -> bytes:
        """New text with the scores of its tokens."""
        logprobs = completion_logprobs(self._names, piece.tokens, self._top)
        return self._ids.frame(self._body(piece.choice, piece.text, logprobs=logprobs))

    def prompt(self, piece: Piece) -> bytes:
        """The scores of the prompt."""
        if self._prompt_scores is None:
            return b""
        return self._ids.frame(self._body(piece.choice, "", prompt_logprobs=self._prompt_scores(piece.prompt)))

    def finish(self, index: int, reason: str) -> bytes:
        """The end of choice ``index``."""
        warnings = self._generation.warnings
        return self._ids.frame({**self._body(index, "", reason), **({"warnings": warnings} if warnings else {})})

    def closing(self, generation: Generation) -> bytes:
        """What comes behind all choices, and the end."""
        if not self._include_usage:
            return self._ids(sse.DONE)
        return self._ids.frame({**self._head, "choices": [], "usage": usage_body(generation)}) + self._ids(sse.DONE)

    def _body(self, index: int, text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason, **more}
        body = {**self._head, "choices": [choice]}
        return {**body, "usage": None} if self._include_usage else body
