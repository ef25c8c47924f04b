"""GET /v1/models, POST /tokenize, POST /detokenize, GET /version: what is served, and its tokens."""

from importlib import metadata
from typing import Any

from flask import Blueprint, Response

from app.api.chat import conversation
from app.api.errors import invalid
from app.api.schemas import DetokenizeRequest, TokenizeRequest
from app.api.service import json_answer, model_not_found, parse, resolve_model, service
from app.text.card import Model
from app.text.prompts import chat_prompt, check_token_ids

blueprint = Blueprint("models", __name__)


@blueprint.get("/v1/models")
def list_models() -> Response:
    """The model under each of its names, and its adapters."""
    model = service().require_model()
    return json_answer({"object": "list", "data": [describe(model, name) for name in all_names(model)]})


@blueprint.get("/v1/models/<path:name>")
def retrieve_model(name: str) -> Response:
    """One name."""
    model = service().require_model()
    if name not in all_names(model):
        raise model_not_found(name)
    return json_answer(describe(model, name))


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


@blueprint.post("/tokenize")
def tokenize() -> Response:
    """The tokens of a text, or of a conversation in the chat template."""
    body = parse(TokenizeRequest)
    model, _, _ = resolve_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if body.prompt is not None:
        tokens = model.encode(body.prompt, add_bos=body.add_special_tokens, param="prompt")
    else:
        tokens = chat_prompt(
            model,
            conversation(body.messages or []),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
    return json_answer({"tokens": tokens, "count": len(tokens), "max_model_len": model.card.max_model_len})


@blueprint.post("/detokenize")
def detokenize() -> Response:
    """The text of tokens."""
    body = parse(DetokenizeRequest)
    model, _, _ = resolve_model(body.model)
    check_token_ids(model, body.tokens, "tokens")
    return json_answer({"prompt": model.decode(body.tokens)})


@blueprint.get("/version")
def version() -> Response:
    """This server's version."""
    return json_answer({"version": VERSION})


def _version() -> str:
    try:
        return metadata.version("tailrace")
    except metadata.PackageNotFoundError:
        return "0.1.0"


VERSION = _version()
