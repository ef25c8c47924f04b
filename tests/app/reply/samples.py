"""Formats with tokens of their own, tools, and texts as models write them."""

from collections.abc import Callable
from typing import Any

from app.text.reply.declared import TAGS, declaration
from app.text.reply.formats import DeclaredFormat, Llama3Format, MistralFormat, ReplyFormat
from app.text.reply.parts import Part, Reply, ReplyParser, Tool, fold
from app.text.reply.thinking import Marks

THINK = Marks("<think>", "</think>")

WEATHER = Tool(
    "get_weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
    },
)
CLOCK = Tool("clock")
TOOLS = [WEATHER, CLOCK]

HERMES = ReplyFormat({}, template_tools=True, marks=THINK)
MISTRAL = MistralFormat({}, marks=None, named=False)
MISTRAL_NAMED = MistralFormat({}, marks=None, named=True)
LLAMA3 = Llama3Format({"<|python_tag|>": 1}, marks=None, single=False)

# What tokenizers may declare: calls with the name in the opening mark, and JSON, or nearly JSON, behind it.
TEMPLATES: dict[str, dict[str, Any]] = {
    kind: {
        "start_anchor": "<|assistant|>",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"\s*<\|call\|>(?P<name>\w+)\s*",
                "close": "<|end|>",
                "content": "json",
                "content_args": options,
                "repeats": True,
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close": "<|eot|>"},
        },
    }
    for kind, options in {"json": {}, "lax": {"unquoted_keys": True, "string_delims": [["<q>", "<q>"]]}}.items()
}

TAGGED = DeclaredFormat({}, template_tools=True, marks=THINK, declared=TAGS)
NAMED_JSON = DeclaredFormat({}, template_tools=True, marks=THINK, declared=declaration(TEMPLATES["json"]))
LAX = DeclaredFormat({}, template_tools=True, marks=THINK, declared=declaration(TEMPLATES["lax"]))

FORMATS = {
    "hermes": HERMES,
    "mistral": MISTRAL,
    "mistral-named": MISTRAL_NAMED,
    "llama3": LLAMA3,
    "tags": TAGGED,
    "named-json": NAMED_JSON,
    "lax": LAX,
}


def numbered() -> Callable[[], str]:
    """Return a maker of ids: c0, c1..."""
    count = iter(range(10**9))
    return lambda: f"c{next(count)}"


def parser(reply_format: ReplyFormat, thinking: bool | None = None) -> ReplyParser:
    """A parser of `TOOLS` with ids that tests can tell."""
    return reply_format.parser(TOOLS, thinking=thinking, new_id=numbered())


def in_pieces(reader: ReplyParser, pieces: list[str]) -> list[Part]:
    """All parts of a text that comes in ``pieces``."""
    parts = [part for piece in pieces for part in reader.push(piece)]
    return parts + reader.finish()


def read(reply_format: ReplyFormat, text: str, thinking: bool | None = None) -> Reply:
    """The reply that ``text`` is; read whole and character by character, which must be the same."""
    whole = fold(in_pieces(parser(reply_format, thinking), [text]))
    assert fold(in_pieces(parser(reply_format, thinking), list(text))) == whole
    return whole


def calls(reply: Reply) -> list[tuple[str, str]]:
    """Names and arguments of the calls."""
    return [(call.name, call.arguments) for call in reply.calls]
