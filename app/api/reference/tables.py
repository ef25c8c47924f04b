"""The tables of fields in docs/api.md, made from the request models."""

import json
import re
from collections.abc import Mapping
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.api.messages.request import MessagesRequest
from app.api.reference.known import known_fields
from app.api.responses.schemas import ResponseRequest
from app.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    TokenizeRequest,
)
from app.api.scoring import RerankRequest, ScoreRequest
from app.text.sampling import DEMO_DEFAULTS

# What a default is that the models do not say, since it is settled later.
_DEFAULTS: Mapping[str, str] = {
    "model": "the served model",
    "max_tokens": "512, or what room is left",
    "max_output_tokens": "512, or what room is left",
    "min_p": "0",
    "typical_p": "1",
    "presence_penalty": "0",
    "frequency_penalty": "0",
    "seed": "random",
    "n": "1",
    "best_of": "`n`",
    "length_penalty": "1",
    "template": "`--completion_template`",
    "transcript_choices": "`--transcript_choices`",
    "timeout": "`--request_timeout_s`",
    "encoding_format": "float",
    "dimensions": "all",
    "add_generation_prompt": "true",
    "parallel_tool_calls": "true",
    "tool_choice": "auto with tools, else none",
    "response_format": "text",
    "min_tokens": "0",
    "method": "embedding",
    "top_n": "all",
    "return_documents": "true",
    "truncation": "disabled",
    "top_logprobs": "0",
}
_OWN_DEFAULTS: Mapping[tuple[type[BaseModel], str], str] = {(ResponseRequest, "store"): "true"}
_EMPTY: Mapping[str, str] = {"logit_bias": "{}", "stop": "[]"}
_SECTION = re.compile(r"(<!-- fields: ([\w ]+) -->\n).*?(<!-- end of fields -->\n)", re.DOTALL)


def tables() -> dict[str, list[str]]:
    """Return the lines of each table by its name in the markers."""
    both = set(GenerationRequest.model_fields)
    chat, completion = set(ChatRequest.model_fields), set(CompletionRequest.model_fields)
    own_maximum = {"max_tokens"}
    return {
        "chat": _done(ChatRequest, chat - both),
        "completions": _done(CompletionRequest, (completion - both) | own_maximum),
        "both": _done(GenerationRequest, both),
        "embeddings": _done(EmbeddingRequest),
        "tokenize": _done(TokenizeRequest),
        "detokenize": _done(DetokenizeRequest),
        "responses": _done(ResponseRequest),
        "messages": _done(MessagesRequest),
        "score": _done(ScoreRequest),
        "rerank": _done(RerankRequest),
        "others": _others({"chat": ChatRequest, "completions": CompletionRequest, "embeddings": EmbeddingRequest}),
        "others of responses": _others({"responses": ResponseRequest}),
        "others of messages": _others({"messages": MessagesRequest}),
    }


def filled(document: str) -> str:
    """Return ``document`` with the present tables between its markers. Raises KeyError for a name that is none."""
    made = tables()

    def fill(found: re.Match[str]) -> str:
        return found[1] + "".join(f"{line}\n" for line in made[found[2]]) + found[3]

    return _SECTION.sub(fill, document)


def names_in(document: str) -> set[str]:
    """Return the names of the tables that ``document`` has a place for."""
    return {found[2] for found in _SECTION.finditer(document)}


def _done(model: type[BaseModel], names: set[str] | None = None) -> list[str]:
    lines = ["| field | status | default | what it does |", "|---|---|---|---|"]
    # What must be given comes first.
    for name, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        if names is None or name in names:
            default = _OWN_DEFAULTS.get((model, name)) or _default(name, field)
            shown = field.alias or name
            lines.append(f"| `{shown}` | done | {default} | {_cell(field.description or '')} |")
    return lines


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if name in DEMO_DEFAULTS:
        return json.dumps(DEMO_DEFAULTS[name])
    if name in _EMPTY:
        return _EMPTY[name]
    value = field.get_default()
    if value is None and name not in _DEFAULTS and bool in get_args(field.annotation):
        return "false"
    return _DEFAULTS.get(name, "null") if value is None else json.dumps(value)


def _others(models: Mapping[str, type[BaseModel]]) -> list[str]:
    """One table for several resources; a field that one of them does is refused by the others alone."""
    several = len(models) > 1
    lines = ["| field | status | value that asks for nothing |" + (" where |" if several else "")]
    lines.append("|---|---|---|" + ("---|" if several else ""))
    known = {name: known_fields(model) for name, model in models.items()}
    rows: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for resource, each in known.items():
        for name, values in each.refused.items():
            shown = ", ".join(json.dumps(value) for value in values)
            rows.setdefault(("refused", name), (shown, []))[1].append(resource)
        for name in each.harmless:
            rows.setdefault(("harmless", name), ("", []))[1].append(resource)
    for (status, name), (shown, where) in sorted(rows.items(), key=lambda row: (row[0][0] != "refused", row[0][1])):
        place = "everywhere" if len(where) == len(models) else ", ".join(where)
        lines.append(f"| `{name}` | {status} | {_cell(shown)} |" + (f" {place} |" if several else ""))
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
