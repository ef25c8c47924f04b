"""The model's chat template: a conversation to the text that the model was trained on.

The template comes from the model directory, never from a client, and runs in `config.template_sandbox`: a
conversation that a template makes too much of is refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.text.errors import RequestError
from config.template_sandbox import MAX_CHARACTERS, RaisedByTemplate, Template, TooMuch

__all__ = ["MAX_CHARACTERS", "MAX_SECONDS", "RESERVED", "ChatTemplate"]

# Marks where the final message ends, to cut off what the template puts behind it. The space at its end shows whether
# the template trims messages.
_END_MARK = "\ue000TAILRACE-END\ue001 "

# The most that a template may take for a conversation. Far beyond what is asked of it.
MAX_SECONDS = 10.0

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


class ChatTemplate:
    """One compiled template. ``special_tokens`` are variables of it (``bos_token``...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises `jinja2.TemplateSyntaxError` if ``source`` is no template."""
        self._template = Template(source)
        self._special_tokens = dict(special_tokens)
        # The names that the template asks for.
        self.variables = self._template.variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the conversation as text.

        ``tools`` are in OpenAI's shape; the arguments of ``tool_calls`` in ``messages`` are objects.
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
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            try:
                text = self._text(values)
            except TypeError:
                # Some templates, unlike transformers' own, put a call's arguments into the text as they are.
                values["messages"] = _with_written_arguments(chat)
                text = self._text(values)
        except RaisedByTemplate as error:
            raise RequestError(
                f"The model's chat template refuses this conversation: {error.message}", "messages"
            ) from None
        except TooMuch:
            raise RequestError("The model's chat template makes too much of this conversation.", "messages") from None
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

    def _text(self, values: Mapping[str, Any]) -> str:
        return self._template.render(values, MAX_SECONDS)


def _with_written_arguments(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of calls as JSON text. Raises `TypeError` if there are none to write."""
    written = []
    found = False
    for message in chat:
        calls = []
        for call in message.get("tool_calls") or ():
            found = True
            given = call["function"]["arguments"]
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        written.append({**message, "tool_calls": calls} if calls else dict(message))
    if not found:
        raise TypeError
    return written
