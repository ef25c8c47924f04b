"""The OpenAPI document: every route of the application with every method, and what goes in and comes out.

OpenAPI Specification 3.1.1; the schemas are JSON Schema 2020-12.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Flask
from werkzeug.routing import Rule

from app.api.kept import MAX_KEY
from app.api.models import VERSION
from app.api.reference.answers.base import AnthropicErrorResponse, ErrorResponse
from app.api.reference.describe import Description, Parameter, description_of
from app.api.reference.schema import schemas
from app.api.service import KEY_HEADER, TIMEOUT_HEADER
from app.api.streams import LAST_EVENT_HEADER
from app.door.gate import OPEN_PATHS
from config.settings import Settings

_ANTHROPIC = "/v1/messages"
_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or a wrong one.",
    404: "There is no such model or object.",
    429: "Too many requests, or this one waited too long.",
    503: "No model can answer now, or not in time.",
}
_HEADERS = {
    "X-Request-Id": "the request's id: the client's own if it is well formed, else a new one",
    "X-Tailrace-Warnings": "unknown fields that were ignored",
    "Retry-After": "seconds after which the request may be sent again",
    "Allow": "the methods that this URL knows",
}
_ABOUT = (
    "OpenAI's API for a language model on this machine, with the extensions that other servers of open models have, "
    "and Anthropic's messages. Numbers are as JSON has them: an integer is written without a fraction or exponent. "
    "Unknown fields of requests are ignored and reported in `warnings`, or refused with `--strict`. A URL that is not "
    "here is a 404, a method that is not here a 405, both as JSON."
)


@dataclass(frozen=True, slots=True)
class Route:
    """A rule of the application with one of its methods."""

    path: str
    method: str
    view: Callable[..., Any]
    rule: Rule

    @property
    def own_view(self) -> bool:
        """Whether the method was written for this route, and did not come with it as HEAD and OPTIONS do."""
        return self.method not in ("HEAD", "OPTIONS")


def routes(app: Flask) -> Iterator[Route]:
    """Yield every rule with every method, in the order of their paths."""
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        for method in sorted(rule.methods or ()):
            yield Route(path, method, app.view_functions[rule.endpoint], rule)


def document(app: Flask, settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document of ``app``."""
    every = list(routes(app))
    described = [description_of(route.view) or Description(tag="others") for route in every]
    types: list[Any] = [ErrorResponse, AnthropicErrorResponse]
    for each in described:
        types += [kind for kind in (each.request, each.answer, each.events, *each.others.values()) if kind is not None]
    of_type, named = schemas(types, strict=settings.strict)
    paths: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for route, description in zip(every, described, strict=True):
        operation = _operation(route, description, of_type, settings)
        if operation["operationId"] in seen:
            # A second URL of the same view.
            operation["operationId"] += f"_{_slug(route.path)}"
        seen.add(operation["operationId"])
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    components: dict[str, Any] = {"schemas": named, "headers": _headers(), "responses": dict(_error_responses(of_type))}
    made: dict[str, Any] = {
        "openapi": "3.1.1",
        "info": {"title": "Tailrace", "version": VERSION, "description": _ABOUT},
        "servers": [{"url": "/", "description": "this server"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in described)],
        "paths": paths,
        "components": components,
    }
    if settings.has_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "an API key of this server"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "the same"},
        }
        made["security"] = [{"bearer": []}, {"x-api-key": []}]
    return made


def _operation(
    route: Route, description: Description, of_type: Mapping[Any, dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    if route.method == "OPTIONS":
        return {
            "operationId": f"options_{route.rule.endpoint.replace('.', '_')}_{_slug(route.path)}",
            "tags": [description.tag],
            "summary": "The methods of this URL",
            "parameters": [_parameter(each) for each in _path_parameters(route, description)],
            "responses": {"200": {"description": "in the header", "headers": _header_references("Allow")}},
        }
    operation: dict[str, Any] = {
        "operationId": route.rule.endpoint.replace(".", "_"),
        "tags": [description.tag],
        "summary": (route.view.__doc__ or route.path).strip().splitlines()[0].rstrip("."),
        "parameters": [_parameter(each) for each in (*_path_parameters(route, description), *_queries(description))],
        "responses": _responses(route, description, of_type),
    }
    if route.method == "HEAD":
        operation["operationId"] = f"head_{operation['operationId']}"
        operation["responses"] = {"default": {"description": "the same status and headers as of GET, and no body"}}
    elif description.request is not None:
        content: dict[str, Any] = {"schema": of_type[description.request]}
        if description.example is not None:
            content["example"] = dict(description.example)
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    if settings.has_keys and route.path in OPEN_PATHS and route.method == "GET":
        operation["security"] = []
    return operation


def _responses(route: Route, description: Description, of_type: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if description.answer is not None:
        content["application/json"] = {"schema": of_type[description.answer]}
    elif description.media_type != "application/json":
        content[description.media_type] = {"schema": {"type": "string"}}
    if description.events is not None:
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": "events; the data of each is the JSON described by x-event"},
            "x-event": of_type[description.events],
        }
    found: dict[str, Any] = {
        str(description.status): {
            "description": "the answer",
            "headers": _header_references("X-Request-Id", "X-Tailrace-Warnings"),
            **({"content": content} if content else {}),
        }
    }
    for status, kind in description.others.items():
        body = {} if kind is None else {"content": {"application/json": {"schema": of_type[kind]}}}
        found[str(status)] = {"description": "the answer", "headers": _header_references("X-Request-Id"), **body}
    family = "Anthropic" if route.path.startswith(_ANTHROPIC) else ""
    for status in _ERRORS:
        found.setdefault(str(status), {"$ref": f"#/components/responses/{family}Error{status}"})
    found["default"] = {"$ref": f"#/components/responses/{family}Error"}
    return found


def _path_parameters(route: Route, description: Description) -> Iterator[Parameter]:
    given = {each.name: each for each in description.parameters if each.place == "path"}
    for name in sorted(route.rule.arguments):
        yield given.get(name) or Parameter(name, name, {"type": "string", "minLength": 1}, "path")


def _queries(description: Description) -> Iterator[Parameter]:
    yield from (each for each in description.parameters if each.place == "query")
    yield Parameter("X-Request-Id", "an id for the logs: up to 128 letters, digits, _ and -", place="header")
    if description.request is not None and "timeout" in description.request.model_fields:
        seconds: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0}
        yield Parameter(TIMEOUT_HEADER, "as `timeout` in the body; the smaller one counts", seconds, "header")
    if description.request is not None and "resumable" in description.request.model_fields:
        key = {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[!-~]+$"}
        yield Parameter(KEY_HEADER, "the client's own name for the request: sent again, it is done once", key, "header")
        event = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}:[0-9]{1,15}$"}
        yield Parameter(LAST_EVENT_HEADER, "the id of an event: the rest of its stream is the answer", event, "header")


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.place == "path",
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }


def _headers() -> dict[str, Any]:
    kinds = {"Retry-After": {"type": "integer", "minimum": 1}}
    return {
        name: {"description": text, "schema": kinds.get(name, {"type": "string"})} for name, text in _HEADERS.items()
    }


def _header_references(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_responses(of_type: Mapping[Any, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for family, model in (("", ErrorResponse), ("Anthropic", AnthropicErrorResponse)):
        content = {"application/json": {"schema": of_type[model]}}
        for status, text in _ERRORS.items():
            names = ("X-Request-Id", "Retry-After") if status in (429, 503) else ("X-Request-Id",)
            headers = _header_references(*names)
            yield f"{family}Error{status}", {"description": text, "headers": headers, "content": content}
        headers = _header_references("X-Request-Id")
        yield f"{family}Error", {"description": "Any other error.", "headers": headers, "content": content}


def _slug(path: str) -> str:
    return re.sub(r"\W+", "_", path).strip("_")
