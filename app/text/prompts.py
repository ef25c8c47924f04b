"""From what a client wrote to the tokens that the model reads."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.text.card import Model
from app.text.errors import RequestError
from app.text.offload import off_hub_if_large
from app.text.template import RESERVED

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as the answer shows it, and where each of its tokens begins in it, in characters."""

    text: str
    offsets: list[int]


def render_chat(
    model: Model,
    messages: Conversation,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the conversation as the model's chat template writes it. Raises `RequestError`."""
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

    def render() -> str:
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    characters = sum(len(message["content"]) for message in messages)
    model.check_characters(characters, "messages")
    size = characters + 64 * len(messages)
    return off_hub_if_large(size, render)


def chat_prompt(model: Model, messages: Conversation, **options: Any) -> list[int]:
    """Return the tokens of a conversation; ``options`` as for `render_chat`.

    The template writes the special tokens, so none are added. Raises `RequestError`.
    """
    return model.encode(render_chat(model, messages, **options), add_bos=False, param="messages")


def completion_prompt(model: Model, prompt: str | list[int], *, wrap: bool, param: str = "prompt") -> list[int]:
    """Return the tokens of one prompt: in the chat template (``wrap``) or raw; token ids as they are.

    Raises `RequestError`.
    """
    if isinstance(prompt, list):
        check_token_ids(model, prompt, param)
        return prompt
    if wrap:
        text = render_chat(model, [{"role": "user", "content": prompt}])
        return model.encode(text, add_bos=False, param=param)
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
