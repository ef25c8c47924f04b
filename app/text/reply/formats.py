"""How a model writes reasoning and calls: chosen once per model, from its template and its tokenizer.

What a template that knows tools makes of them decides the format. Where the template knows none, or writes them in a
way that no parser here reads, the format is Hermes': the tools are then told in a system message (`tools_prompt`), and
calls and results stand in the history as text (`write_call`, `write_result`).
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta

from app.ids import IdShape
from app.text.reply.declared import TAGS, Declaration, DeclaredParser, declaration
from app.text.reply.grammars import CallShape, HeldCalls, calls_grammar, with_reasoning
from app.text.reply.hermes import CLOSE, OPEN, HermesParser
from app.text.reply.llama3 import TAG, Llama3Parser
from app.text.reply.mistral import ARGS, CALLS, MistralParser
from app.text.reply.parts import Call, PlainParser, ReplyParser, Tool, ToolChoice
from app.text.reply.patterns import Capture
from app.text.reply.patterns import Literal as Text
from app.text.reply.thinking import Marks, ThinkingParser
from config import logs
from workers.messages import Grammar

if TYPE_CHECKING:
    from app.text.card import Model

log = logs.logger("tailrace.app")

# The marks of reasoning that models were trained with.
_THINKING = (Marks("<think>", "</think>"), Marks("[THINK]", "[/THINK]"))


class ReplyFormat:
    """One model's format; this class is Hermes', the others extend it.

    ``template_tools``: the chat template takes ``tools``, and tool messages, and writes them in this format.
    ``marks``: those of the model's reasoning, None if it knows none. ``token_ids``: the ids of its added tokens.
    """

    name = "hermes"
    # What ids of calls look like: as OpenAI's, where the template takes those.
    call_ids = IdShape("call_")

    def __init__(self, token_ids: dict[str, int], *, template_tools: bool, marks: Marks | None) -> None:
        self.token_ids = token_ids
        self.template_tools = template_tools
        self.marks = marks

    # --- reading

    def thinking_after(self, prompt: str) -> bool | None:
        """Return what the end of the rendered prompt says of reasoning.

        True: it is open, so the text begins inside it. False: there is none (the model knows none, or the prompt has
        closed it already). None: the model decides.
        """
        if self.marks is None:
            return False
        tail = prompt[-256:].rstrip()
        if tail.endswith(self.marks.close):
            return False
        return True if tail.endswith(self.marks.open) else None

    def parser(
        self, tools: Sequence[Tool] = (), *, thinking: bool | None = None, new_id: Callable[[], str] | None = None
    ) -> ReplyParser:
        """Return a parser for the text of one choice.

        ``tools``: those that may be called; none for a request without tools, and for one that wants no calls.
        ``thinking``: see `thinking_after`. ``new_id`` makes the ids of calls.
        """
        calls = self._calls(tools, new_id or self.call_ids.new) if tools else PlainParser()
        if self.marks is None or thinking is False:
            return calls
        return ThinkingParser(calls, self.marks, inside=thinking is True)

    def visible_tokens(self, *, tools: bool, thinking: bool | None = None) -> frozenset[int]:
        """Return the special tokens that a parser must see as text; `parser` with the same arguments reads them."""
        words = list(self.call_marks) if tools else []
        if self.marks is not None and thinking is not False:
            words += [self.marks.open, self.marks.close]
        return frozenset(self.token_ids[word] for word in words if word in self.token_ids)

    # Whether the template refuses a message with several calls.
    single = False

    @property
    def call_marks(self) -> Sequence[str]:
        """The marks around calls."""
        return (OPEN, CLOSE)

    @property
    def call_shape(self) -> CallShape:
        """How calls are written where a grammar says so."""
        return CallShape((OPEN, "\n"), ('{"name": "{}", "arguments": ',), ("}",), ("\n", CLOSE), "\n")

    def _calls(self, tools: Sequence[Tool], new_id: Callable[[], str]) -> ReplyParser:
        return HermesParser(_names(tools), new_id)

    # --- grammars

    def grammar(
        self, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool = True, thinking: bool | None = None
    ) -> HeldCalls | None:
        """Return the grammar that holds a reply to ``choice``, or None if it is free.

        A reply is held when a call is required, when there may be only one (``parallel``), when the choice names tools,
        and when a tool is strict.
        Required calls, and those of strict tools, match their schemas; those of others are JSON objects. With "auto"
        the reply is free text, or calls behind it. Raises `RequestError` for parameters that are no schema of an
        object.
        """
        return calls_grammar(
            self.token_ids,
            self.call_shape,
            tools,
            choice,
            parallel=parallel and not self.single,
            marks=self.marks,
            thinking=thinking,
        )

    def with_reasoning(self, grammar: Grammar, *, thinking: bool | None = None) -> Grammar:
        """Return ``grammar`` behind the reasoning that a model begins its reply with, if it does."""
        return with_reasoning(self.token_ids, grammar, self.marks, thinking)

    # --- for templates that know no tools

    def tools_prompt(self, tools: Sequence[Tool]) -> str:
        """Return what a system message tells the model of the tools."""
        lines = [_line(tool.for_template()) for tool in tools]
        return (
            "You can call tools. These are the tools, one JSON object per line:\n"
            + "\n".join(lines)
            + "\n\nTo call a tool, answer with a JSON object of its name and its arguments between two marks, like "
            f'this:\n{OPEN}\n{{"name": "the tool\'s name", "arguments": {{"an argument": "its value"}}}}\n{CLOSE}\n'
            "What the tool returns comes between <tool_response> and </tool_response>. Answer without a call if none "
            "of the tools helps."
        )

    def write_call(self, call: Call) -> str:
        """Return a call of the history as the assistant wrote it."""
        return f'{OPEN}\n{{"name": {_line(call.name)}, "arguments": {call.arguments}}}\n{CLOSE}'

    def write_result(self, content: str, name: str | None = None) -> str:
        """Return a tool's result as the text of a user message; ``name`` is the tool's, where it is known."""
        told = content if name is None else _line({"name": name, "content": content})
        return f"<tool_response>\n{told}\n</tool_response>"


class MistralFormat(ReplyFormat):
    """Mistral's; ``named``: a call is a name and its arguments, not an object of both."""

    name = "mistral"
    # Mistral's templates refuse any id but nine letters and digits.
    call_ids = IdShape("", 9)

    def __init__(self, token_ids: dict[str, int], *, marks: Marks | None, named: bool) -> None:
        super().__init__(token_ids, template_tools=True, marks=marks)
        self.named = named

    @property
    def call_marks(self) -> Sequence[str]:
        return (CALLS, ARGS, "[CALL_ID]")

    @property
    def call_shape(self) -> CallShape:
        if self.named:
            return CallShape((CALLS,), ("{}", ARGS), (), (), "", quoted=False)
        return CallShape((CALLS, "["), ('{"name": "{}", "arguments": ',), ("}",), ("]",), ", ", once=True)

    def _calls(self, tools: Sequence[Tool], new_id: Callable[[], str]) -> ReplyParser:
        return MistralParser(_names(tools), new_id)


class Llama3Format(ReplyFormat):
    """Llama 3.x's; ``single``: the template refuses a message with several calls."""

    name = "llama3"

    def __init__(self, token_ids: dict[str, int], *, marks: Marks | None, single: bool) -> None:
        super().__init__(token_ids, template_tools=True, marks=marks)
        self.single = single

    @property
    def call_marks(self) -> Sequence[str]:
        return (TAG,)

    @property
    def call_shape(self) -> CallShape:
        return CallShape((), ('{"name": "{}", "parameters": ',), ("}",), (), "; ")

    def _calls(self, tools: Sequence[Tool], new_id: Callable[[], str]) -> ReplyParser:
        return Llama3Parser(_names(tools), new_id, TAG in self.token_ids)


class DeclaredFormat(ReplyFormat):
    """What the tokenizer declares. Where its calls cannot be held to a schema, a grammar writes Hermes'."""

    name = "declared"

    def __init__(
        self, token_ids: dict[str, int], *, template_tools: bool, marks: Marks | None, declared: Declaration
    ) -> None:
        super().__init__(token_ids, template_tools=template_tools, marks=marks)
        self.declared = declared

    @property
    def call_marks(self) -> Sequence[str]:
        return (*super().call_marks, *self.declared.words)

    @property
    def call_shape(self) -> CallShape:
        match self.declared:
            case Declaration(kind="objects", open=[Text(first)], close=[*_, Text(last)]):
                return CallShape((first, "\n"), ('{"name": "{}", "arguments": ',), ("}",), ("\n", last), "\n")
            case Declaration(kind="json", open=[Text(first), Capture(), *rest], close=[*_, Text(last)]):
                before = [step.text for step in rest if isinstance(step, Text)]
                return CallShape((first,), ("{}", *before), (), (last,), "\n", quoted=False)
        return super().call_shape

    def _calls(self, tools: Sequence[Tool], new_id: Callable[[], str]) -> ReplyParser:
        return DeclaredParser(tools, new_id, self.declared)


def reply_format(model: "Model") -> ReplyFormat:
    """Return the format of ``model``; worked out once for each."""
    known = model.reply_format
    if known is None:
        known = model.reply_format = _detect(model)
    return known


def _detect(model: "Model") -> ReplyFormat:
    source = model.card.chat_template or ""
    token_ids = {token.content: i for i, token in model.tokenizer.get_added_tokens_decoder().items()}
    marks = next((m for m in _THINKING if m.close in source or (m.open in token_ids and m.close in token_ids)), None)
    takes_tools = _takes_tools(source)
    declared = _declared(model)
    if declared is not None:
        marks = declared.marks or marks
        if declared.kind is not None:
            return DeclaredFormat(token_ids, template_tools=takes_tools, marks=marks, declared=declared)
    if not takes_tools:
        return ReplyFormat(token_ids, template_tools=False, marks=marks)
    if CALLS in source:
        return MistralFormat(token_ids, marks=marks, named=ARGS in source)
    if OPEN in source and "<function=" in source and "<parameter=" in source:
        return DeclaredFormat(token_ids, template_tools=True, marks=marks, declared=TAGS)
    if OPEN in source:
        return ReplyFormat(token_ids, template_tools=True, marks=marks)
    if TAG in source or ("ipython" in source and '"parameters": ' in source):
        return Llama3Format(token_ids, marks=marks, single="single tool-call" in source)
    return ReplyFormat(token_ids, template_tools=False, marks=marks)


def _declared(model: "Model") -> Declaration | None:
    if model.card.response_template is None:
        return None
    try:
        return declaration(model.card.response_template)
    except ValueError as error:
        log.warning("the tokenizer's response template is not used", reason=str(error))
        return None


def _takes_tools(source: str) -> bool:
    if "tools" not in source:
        return False
    environment = jinja2.Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"])
    try:
        return "tools" in meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError:
        # A template with a block of transformers' own; the word alone must do.
        return True


def _names(tools: Sequence[Tool]) -> list[str]:
    return [tool.name for tool in tools]


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
