"""From what a client wrote to the tokens that the model reads."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from app.text.card import Model
from app.text.errors import ContextLengthExceeded, RequestError
from app.text.offload import off_hub_if_large, weight
from app.text.reply.formats import reply_format
from app.text.reply.parts import Tool
from app.text.specials import SpecialTokens
from app.text.template import RESERVED
from app.text.told_tools import told_in_text

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as the answer shows it, and where each of its tokens begins in it, in characters."""

    text: str
    offsets: list[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model reads it; ``text`` is what its template wrote."""

    ids: list[int]
    text: str


def read_chat(
    model: Model,
    messages: Conversation,
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    param: str = "messages",
) -> ChatPrompt:
    """Return a conversation in the model's chat template, which is told of ``tools``; ``param`` names it in errors.

    The template writes the special tokens, so none are added; those that the client wrote are text. Raises
    `RequestError`.
    """
    template = model.template
    if template is None:
        raise RequestError("This model has no chat template; use /v1/completions instead.", "messages")
    for name in variables or {}:
        if name in RESERVED or name in model.card.special_tokens or name.startswith("_"):
            raise RequestError(
                "This variable of the template cannot be set by a request.", f"chat_template_kwargs.{name}"
            )
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise RequestError("Only a final message of the assistant can be continued.", "continue_final_message")
    form = reply_format(model)

    def render() -> tuple[str, str]:
        told: Conversation = messages
        offered = [tool.for_template() for tool in tools]
        if not form.template_tools and (tools or any(_is_about_tools(message) for message in messages)):
            told, offered = told_in_text(messages, tools, form), []
        given = {"messages": list(told), "tools": offered, "variables": variables or {}}
        safe, cut = special_tokens(model).cut(given)
        text = template.render(
            safe["messages"],
            tools=safe["tools"],
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            variables=safe["variables"],
        )
        return text, cut

    characters = sum(len(message["content"]) for message in messages)
    model.check_characters(characters, param)
    # All that the template may look at, which is more than what is said.
    size = weight(messages) + weight(variables) + 64 * len(messages) + 1024 * len(tools)
    text, cut = off_hub_if_large(size, render)
    if not cut:
        return ChatPrompt(model.encode(text, add_bos=False, param=param), text)
    return ChatPrompt(_encode_pieces(model, text.split(cut), param), text.replace(cut, ""))


def chat_prompt(model: Model, messages: Conversation, **options: Any) -> list[int]:
    """Return the tokens of a conversation; ``options`` as for `read_chat`. Raises `RequestError`."""
    return read_chat(model, messages, **options).ids


def special_tokens(model: Model) -> SpecialTokens:
    """Return the special tokens of ``model``; worked out once for each."""
    known = _specials.get(model)
    if known is None:
        known = _specials[model] = SpecialTokens(model.tokenizer, frozenset(model.card.special_tokens.values()))
    return known


_specials: WeakKeyDictionary[Model, SpecialTokens] = WeakKeyDictionary()


def _is_about_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _encode_pieces(model: Model, pieces: Sequence[str], param: str) -> list[int]:
    """Return the tokens of the pieces, one behind the other. Raises `ContextLengthExceeded`."""
    model.check_characters(sum(map(len, pieces)), param)

    def encode() -> list[int]:
        encodings = model.tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        count = sum(map(len, encodings))
        if count > model.card.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {model.card.max_model_len} tokens, "
                f"but the prompt has {count} tokens.",
                param,
            )
        return [token for encoding in encodings for token in encoding.ids]

    return off_hub_if_large(sum(map(len, pieces)) + 64 * len(pieces), encode)


def completion_prompt(model: Model, prompt: str | list[int], *, wrap: bool, param: str = "prompt") -> list[int]:
    """Return the tokens of one prompt: in the chat template (``wrap``) or raw; token ids as they are.

    Raises `RequestError`.
    """
    if isinstance(prompt, list):
        check_token_ids(model, prompt, param)
        return prompt
    if wrap:
        return chat_prompt(model, [{"role": "user", "content": prompt}], param=param)
    ids = model.encode(prompt, add_bos=True, param=param)
    if not ids:
        raise RequestError("An empty text has no tokens to start from.", param)
    return ids


def infill_prompt(model: Model, prompt: str | list[int], suffix: str, *, param: str = "prompt") -> list[int]:
    """Return the tokens that make the model write what stands between ``prompt`` and ``suffix``.

    Raises `RequestError`, naming ``suffix`` when the model knows no such thing.
    """
    marks = model.infill
    if marks is None:
        raise RequestError("This model cannot fill in the middle: its tokenizer has no tokens for it.", "suffix")
    if isinstance(prompt, str):
        before = model.encode(prompt, add_bos=False, param=param)
    else:
        check_token_ids(model, prompt, param)
        before = prompt
    ids = marks.prompt(before, model.encode(suffix, add_bos=False, param="suffix"))
    return [model.bos, *ids] if model.bos is not None else ids


def echo_of(model: Model, prompt: str | list[int], ids: list[int]) -> Echo:
    """Return how the answer repeats ``prompt``, whose tokens are ``ids``: a text as it was written.

    The token that is put before a text has a place among the tokens, but no text.
    """
    if isinstance(prompt, list):
        return Echo(model.decode(ids), off_hub_if_large(len(ids), _offsets, model, ids))
    lead = 1 if model.bos is not None else 0
    offsets = off_hub_if_large(len(ids), _offsets, model, ids[lead:])
    # SentencePiece writes a space before the first word that is not in the text.
    first = model.token_names(ids[lead])[0] if len(ids) > lead else ""
    shift = 1 if first.startswith(" ") and not prompt.startswith(" ") else 0
    return Echo(prompt, [0] * lead + [min(max(offset - shift, 0), len(prompt)) for offset in offsets])


def _offsets(model: Model, ids: Sequence[int]) -> list[int]:
    begin = 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = []
    for token_id in ids:
        offsets.append(begin)
        raw = model.token_names(token_id)[1]
        begin += 1 if raw is None else len(decoder.decode(bytes(raw)))
    return offsets


def check_token_ids(model: Model, ids: Sequence[int], param: str) -> None:
    """Raises `RequestError` if one of ``ids`` is no token of the model."""
    if ids and not (min(ids) >= 0 and max(ids) < model.card.vocab_size):
        raise RequestError(f"Token ids must be at least 0 and below {model.card.vocab_size}.", param)
