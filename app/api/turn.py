"""One turn of a conversation: the road that chat completions, responses and messages share.

A request of any of them becomes a `ChatRequest`. Here it becomes a prompt (`turn_prompt`), a grammar, and a job of the
pool (`start_turn`); what the model says to it is taken apart by the turn's own parsers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.admission import Held, continued, start_generation
from app.api.kept import Ticket
from app.api.schemas import ChatRequest, Message
from app.api.schemas.tools import NamedTool
from app.api.service import engine_plan, resolve_model, service
from app.errors import invalid
from app.pool_stream import Stream
from app.text.card import Model
from app.text.errors import RequestError
from app.text.generation import Answer, Generation
from app.text.offload import off_hub_if_large
from app.text.prompts import ChatPrompt, read_chat
from app.text.reply.formats import reply_format
from app.text.reply.parts import PlainParser, Reply, ReplyParser, parse_whole

# In the measure of `off_hub_if_large`.
_MESSAGE_COST = 16
_CALL_COST = 128


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that was admitted. ``name``: the model as the client called it; ``created``: seconds since 1970.

    ``thinking``: what the end of the prompt says of reasoning, see `ReplyFormat.thinking_after`.
    """

    id: str
    created: int
    name: str
    model: Model
    body: ChatRequest
    generation: Generation
    thinking: bool | None

    @property
    def plain(self) -> bool:
        """Whether all that the model says is content: nobody has to look at it."""
        return isinstance(self.parser(), PlainParser)

    def parser(self, choice: int = 0) -> ReplyParser:
        """Return a parser for the text of ``choice``; each needs its own.

        Calls have the same ids whenever the turn is parsed: those of the stream are those of what is stored.
        """
        form = reply_format(self.model)
        ids = form.call_ids.following(f"{self.id}/{choice}")
        return form.parser(self.body.callable_tools, thinking=self.thinking, new_id=lambda: next(ids))

    def reply(self, answer: Answer, choice: int = 0) -> Reply:
        """Return a complete choice, taken apart."""
        return off_hub_if_large(len(answer.text), parse_whole, self.parser(choice), answer.text)

    def finish_reason(self, reason: str, calls: int) -> str:
        """Return why a choice ended, as the client sees it: the model stops for its calls to be answered."""
        return "tool_calls" if reason == "stop" and calls else reason

    def reasoning_tokens(self, thoughts: Iterable[str]) -> int | None:
        """Return how many tokens ``thoughts`` (one for each choice) are; None of a model without reasoning.

        They are counted as the tokenizer writes them, which is as the model wrote them but for rare cases.
        """
        if reply_format(self.model).marks is None:
            return None
        texts = [text for text in thoughts if text]
        count = off_hub_if_large(sum(map(len, texts)), _count_tokens, self.model, texts)
        return min(count, self.generation.usage.completion_tokens)


def start_turn(body: ChatRequest, request_id: str, stream: Stream) -> Turn:
    """Hand the turn to the pool. Raises whatever keeps it from being admitted."""
    model, name, adapter = resolve_model(body.model)
    settled = engine_plan(body, model)
    prompt = _read(body, model)
    form = reply_format(model)
    # A message that goes on has been begun: it is neither reasoning nor the beginning of calls any more.
    thinking = False if body.continue_final_message else form.thinking_after(prompt.text)
    generation, ticket = start_generation(
        stream,
        request_id,
        body,
        model,
        name,
        adapter,
        settled,
        [prompt.ids],
        "messages",
        held=_held(body, model, thinking),
        visible_tokens=_visible(body, model, thinking),
        thinking=thinking,
    )
    return _turn(ticket, model, body, generation)


def continued_turn(body: ChatRequest, ticket: Ticket, stream: Stream) -> Turn:
    """Return the turn of a kept request that ``stream`` reads. Raises `ApiError` without a model."""
    model = service().require_model()
    visible = _visible(body, model, ticket.thinking)
    return _turn(ticket, model, body, continued(stream, ticket, body, model, visible_tokens=visible))


def _turn(ticket: Ticket, model: Model, body: ChatRequest, generation: Generation) -> Turn:
    return Turn(ticket.id, ticket.created, ticket.name, model, body, generation, ticket.thinking)


def _visible(body: ChatRequest, model: Model, thinking: bool | None) -> frozenset[int]:
    return reply_format(model).visible_tokens(tools=bool(body.callable_tools), thinking=thinking)


def turn_prompt(body: ChatRequest, model: Model) -> list[int]:
    """Return the tokens of the conversation. Raises `RequestError`."""
    return _read(body, model).ids


def _read(body: ChatRequest, model: Model) -> ChatPrompt:
    return read_chat(
        model,
        conversation(body.messages),
        tools=body.offered,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables={**_asked_variables(body, model), **(body.chat_template_kwargs or {})},
    )


def _held(body: ChatRequest, model: Model, thinking: bool | None) -> Held:
    """Return what the answer is held to: calls, or the request's own grammar behind the reasoning."""
    form = reply_format(model)
    guided = body.grammar()
    if body.offered:
        if guided is not None:
            raise invalid(f"{guided[1]} and tools that may be called cannot be combined.", guided[1])
        # A named tool is called once, as OpenAI's clients expect.
        single = body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool)
        calls = form.grammar(body.offered, body.choice, parallel=not single, thinking=thinking)
        if calls is not None:
            return Held(calls.grammar, "tools", calls.params)
    if guided is not None:
        return Held(form.with_reasoning(guided[0], thinking=thinking), guided[1])
    return Held()


def _asked_variables(body: ChatRequest, model: Model) -> dict[str, Any]:
    """Return the variables of the template that stand for fields of the request. Raises `RequestError`."""
    known = model.template.variables if model.template is not None else frozenset()
    variables: dict[str, Any] = {}
    effort = body.reasoning_effort
    if effort is not None:
        if "reasoning_effort" in known:
            variables["reasoning_effort"] = effort
        if "enable_thinking" in known:
            variables["enable_thinking"] = effort != "none"
        if not variables and (effort != "none" or reply_format(model).marks is not None):
            raise RequestError(f"This model cannot be told a reasoning_effort of {effort}.", "reasoning_effort")
    if body.verbosity is not None:
        if "verbosity" in known:
            variables["verbosity"] = body.verbosity
        elif body.verbosity != "medium":
            raise RequestError(f"This model cannot be told a verbosity of {body.verbosity}.", "verbosity")
    return variables


def conversation(given: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Return the messages as the template sees them, behind the server's own system prompt if they have none."""
    arguments = sum(_CALL_COST + len(call.function.arguments) for message in given for call in message.calls)
    return off_hub_if_large(_MESSAGE_COST * len(given) + arguments, _conversation, given)


def _conversation(given: Sequence[Message]) -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = []
    tool_names: dict[str, str] = {}
    for message in given:
        messages.append(message.for_template(tool_names))
        tool_names.update((call.id, call.function.name) for call in message.calls)
    system_prompt = service().settings.system_prompt
    if system_prompt and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _count_tokens(model: Model, texts: Sequence[str]) -> int:
    return sum(map(len, model.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)))
