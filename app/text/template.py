"""The model's chat template: a conversation to the text that the model was trained on.

The template comes from the model directory, never from a client, and runs in Jinja's sandbox with the same additions as
in transformers (``raise_exception``, ``strftime_now``, ``tojson``, loop controls, ``{% generation %}`` blocks), so it
renders the same text.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.text.errors import RequestError

# Marks where the final message ends, to cut off what the template puts behind it. The space at its end shows whether
# the template trims messages.
_END_MARK = "\ue000TAILRACE-END\ue001 "

# What a client's chat_template_kwargs must not replace.
RESERVED = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "tokenizer",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "raise_exception",
        "strftime_now",
        "namespace",
        "dict",
        "range",
    ]
)


class _RaisedByTemplate(jinja2.TemplateError):
    """The template itself refused the conversation; its message is meant for people."""


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training, no more."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))]


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


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


class ChatTemplate:
    """One compiled template. ``special_tokens`` are variables of it (``bos_token``...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises `jinja2.TemplateSyntaxError` if ``source`` is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text.

        ``continue_final_message`` leaves the last message open, so that the model goes on with it. Raises
        `RequestError` if the template refuses the conversation.
        """
        chat = [dict(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] = f"{chat[-1]['content']}{_END_MARK}"
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": chat,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(values)
        except _RaisedByTemplate as error:
            raise RequestError(
                f"The model's chat template refuses this conversation: {error.message}", "messages"
            ) from None
        except Exception:
            # Whatever a template does wrong with odd input, it is this conversation that cannot be rendered.
            raise RequestError("The model's chat template cannot render this conversation.", "messages") from None
        if continue_final_message:
            text, mark, behind = text.rpartition(_END_MARK.strip())
            if not behind.startswith(" "):
                text = text.rstrip()
            if not mark:
                raise RequestError(
                    "The model's chat template cannot continue the final message.", "continue_final_message"
                )
        return text
