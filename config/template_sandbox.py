"""The sandbox in which a model's chat template runs, on the text side for every conversation, once in a model worker.

It is Jinja's, with the same additions as in transformers (``raise_exception``, ``strftime_now``, ``tojson``, loop
controls, ``{% generation %}`` blocks), so it renders the same text; and loops and strings have bounds.
"""

import json
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The most that a template may make of a conversation.
MAX_CHARACTERS = 64 * 1024 * 1024
# Fields of a format that ask for very many characters, or may ask for any number: "%999999999d", "%*d".
_WIDE = re.compile(r"%[^a-zA-Z]*(\d{5}|\*)")
_deadline: ContextVar[float] = ContextVar("template deadline")

_CHECK_SECONDS = 5.0
_HELLO = {"role": "user", "content": "Hello!"}
_PLAIN = (
    [_HELLO],
    [_HELLO, {"role": "assistant", "content": "Hello."}, _HELLO],
    [{"role": "system", "content": "Be kind."}, _HELLO],
)


class RaisedByTemplate(jinja2.TemplateError):
    """The template itself refused the conversation; its message is meant for people."""


class TooMuch(Exception):
    """The template takes too long, or writes too much."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which knows when it is enough."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TooMuch
        if operator == "**" or (operator == "*" and _product(left, right) > MAX_CHARACTERS):
            raise TooMuch
        return super().call_binop(context, operator, left, right)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() > _deadline.get():
            raise TooMuch
        return super().call(*args, **kwargs)


def _product(left: Any, right: Any) -> int:
    """The length of a sequence times a number; 0 for two numbers, which are small if their product is."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            return len(one) * other
    return abs(left * right) if isinstance(left, int) and isinstance(right, int) else 0


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training, no more."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))]


def _raise_exception(message: str) -> NoReturn:
    raise RaisedByTemplate(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(template: str) -> str:
    return datetime.now().strftime(template)


class Template:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        """Raises `jinja2.TemplateSyntaxError` if ``source`` is no template."""
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        # The names that the template asks for.
        self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))

    def render(self, values: Mapping[str, Any], seconds: float) -> str:
        """Return the text. Raises `TooMuch`, `RaisedByTemplate`, and whatever else a template can do wrong."""
        until = time.monotonic() + seconds
        token = _deadline.set(until)
        try:
            parts = []
            size = 0
            for part in self._template.generate(values):
                parts.append(part)
                size += len(part)
                if size > MAX_CHARACTERS or time.monotonic() > until:
                    raise TooMuch
            return "".join(parts)
        finally:
            _deadline.reset(token)


def fault_of(source: str, special_tokens: Mapping[str, str]) -> str | None:
    """Return what is wrong with a template that reaches for what it must not, or renders no plain conversation."""
    try:
        template = Template(source)
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return f"it is no Jinja template{line}: {error.message}"
    problems = []
    for messages in _PLAIN:
        values = {**special_tokens, "messages": messages, "tools": None, "documents": None}
        try:
            template.render({**values, "add_generation_prompt": True}, _CHECK_SECONDS)
        except RaisedByTemplate:
            pass  # this kind of conversation it does not want
        except TooMuch:
            return "it takes too long, or writes too much"
        except SecurityError as error:
            return f"it reaches for what it must not: {error.message}"
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    return f"it renders no conversation: {problems[0]}" if len(problems) == len(_PLAIN) else None
