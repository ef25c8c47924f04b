"""GET /v1/models, POST /tokenize, POST /detokenize, GET /version: what is served, and its tokens."""

from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from flask import Blueprint, Response, request

from app.api.reference.answers.service import (
    AnthropicModelEntry,
    AnthropicModelList,
    Detokenized,
    ModelEntry,
    ModelList,
    Tokens,
    Version,
)
from app.api.reference.describe import describes
from app.api.schemas import DetokenizeRequest, TokenizeRequest
from app.api.service import json_answer, model_not_found, parse, resolve_model, service
from app.api.turn import conversation
from app.errors import invalid
from app.text.card import Model
from app.text.offload import off_hub_if_large
from app.text.prompts import chat_prompt, check_token_ids

blueprint = Blueprint("models", __name__)


@blueprint.get("/v1/models")
@describes(tag="models", answer=ModelList | AnthropicModelList)
def list_models() -> Response:
    """The model under each of its names, and its adapters."""
    model = service().require_model()
    names = all_names(model)
    if asked_by_anthropic():
        data = [describe_for_anthropic(model, name) for name in names]
        return json_answer({"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]})
    return json_answer({"object": "list", "data": [describe(model, name) for name in names]})


@blueprint.get("/v1/models/<path:name>")
@describes(tag="models", answer=ModelEntry | AnthropicModelEntry)
def retrieve_model(name: str) -> Response:
    """One name."""
    model = service().require_model()
    if name not in all_names(model):
        raise model_not_found(name)
    return json_answer(describe_for_anthropic(model, name) if asked_by_anthropic() else describe(model, name))


def all_names(model: Model) -> list[str]:
    """Every name that a request may use."""
    return list(dict.fromkeys([*model.names, *model.card.adapters]))


def describe(model: Model, name: str) -> dict[str, Any]:
    """One entry of the list."""
    card = model.card
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "tailrace",
        "root": card.id,
        "parent": card.id if name in card.adapters else None,
        "max_model_len": card.max_model_len,
    }


def asked_by_anthropic() -> bool:
    """Whether the client is Anthropic's, which knows this URL too, but another answer."""
    return "anthropic-version" in request.headers


def describe_for_anthropic(model: Model, name: str) -> dict[str, Any]:
    """One entry of the list in Anthropic's shape."""
    card = model.card
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": card.max_model_len,
        "max_tokens": card.max_model_len,
    }


@blueprint.post("/tokenize")
@describes(tag="tokens", request=TokenizeRequest, answer=Tokens, example={"prompt": "a text"})
def tokenize() -> Response:
    """The tokens of a text, or of a conversation in the chat template."""
    body = parse(TokenizeRequest)
    model, _, _ = resolve_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.prompt is not None:
        for name in ("tools", "chat_template_kwargs", "continue_final_message"):
            if getattr(body, name):
                raise invalid(f"{name} belongs to messages, not to prompt.", name)
        tokens = model.encode(body.prompt, add_bos=body.add_special_tokens, param="prompt")
    else:
        tokens = chat_prompt(
            model,
            conversation(body.messages or []),
            tools=body.offered,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": model.card.max_model_len}
    if body.return_token_strs:
        answer["token_strs"] = off_hub_if_large(len(tokens), lambda: list(map(model.tokenizer.id_to_token, tokens)))
    return json_answer(answer)


@blueprint.post("/detokenize")
@describes(tag="tokens", request=DetokenizeRequest, answer=Detokenized, example={"tokens": [64, 65]})
def detokenize() -> Response:
    """The text of tokens."""
    body = parse(DetokenizeRequest)
    model, _, _ = resolve_model(body.model)
    check_token_ids(model, body.tokens, "tokens")
    return json_answer({"prompt": model.decode(body.tokens)})


@blueprint.get("/version")
@describes(tag="health", answer=Version)
def version() -> Response:
    """This server's version."""
    return json_answer({"version": VERSION})


def _version() -> str:
    try:
        return metadata.version("tailrace")
    except metadata.PackageNotFoundError:
        return "0.1.0"


VERSION = _version()
