"""The fields that a request may have beside those that are done: refused ones and harmless ones, by model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from app.api import fields
from app.api.messages.known import AnthropicRequest
from app.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from app.api.values import ApiRequest

NOT_SUPPORTED = "not supported: only a value that asks for nothing"
NO_INFLUENCE = "has no influence on the answer"

_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "metadata": {"anyOf": [fields.PAIRS, {"type": "null"}]},
    "prompt_cache_options": {"type": ["object", "null"]},
}


@dataclass(frozen=True, slots=True)
class Known:
    """``refused``: field -> values that ask for nothing, beside null. ``harmless``: field -> its JSON schema."""

    refused: Mapping[str, tuple[Any, ...]]
    harmless: Mapping[str, Mapping[str, Any]]

    def properties(self) -> dict[str, dict[str, Any]]:
        """Return both as JSON schemas of properties."""
        found: dict[str, dict[str, Any]] = {}
        for name, values in sorted(self.refused.items()):
            found[name] = {"enum": [None, *values], "description": NOT_SUPPORTED}
        for name, schema in sorted(self.harmless.items()):
            found[name] = {**schema, "description": NO_INFLUENCE}
        return found


_NOTHING = Known({}, {})


def known_fields(model: type[BaseModel]) -> Known:
    """Return what a request model knows and does not do."""
    if issubclass(model, AnthropicRequest):
        sample = model.model_construct()
        return _without(model, sample.refused(), {name: {} for name in sample.harmless()})
    own = getattr(model, "KNOWN", None)
    if own is not None:
        return _without(model, *own)
    if issubclass(model, ChatRequest | CompletionRequest | EmbeddingRequest | TokenizeRequest | DetokenizeRequest):
        return _without(model, fields.NEUTRAL, {name: _SHAPES.get(name, fields.WORD) for name in fields.HARMLESS})
    return _NOTHING


def _without(
    model: type[BaseModel], refused: Mapping[str, tuple[Any, ...]], harmless: Mapping[str, Mapping[str, Any]]
) -> Known:
    done = model.model_fields
    return Known(
        {name: values for name, values in refused.items() if name not in done},
        {name: schema for name, schema in harmless.items() if name not in done},
    )


def is_request(model: type[BaseModel]) -> bool:
    """Whether it is (a part of) a request: its unknown fields are accepted with a warning."""
    return issubclass(model, ApiRequest)
