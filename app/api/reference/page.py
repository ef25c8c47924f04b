"""The description as one page of HTML, without scripts and without anything from elsewhere."""

import base64
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from app.api.reference.known import NO_INFLUENCE, NOT_SUPPORTED

_FOLDER = Path(__file__).parent
_REFERENCE = "#/components/"
# What people look for first.
_FIRST = ("chat", "completions", "responses", "messages", "embeddings")


@dataclass(frozen=True, slots=True)
class Page:
    """The page and the Content-Security-Policy that it is sent with."""

    html: bytes
    policy: str


def page(document: Mapping[str, Any]) -> Page:
    """Return the page of an OpenAPI document."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    templates = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"shape": shape, "code": code, "anchor": anchor}
    view = _View(document)
    html = templates.get_template("page.html").render(
        document=document,
        style=Markup(style),
        tags=view.tags(),
        schemas=view.schemas(),
        secured=bool(document.get("security")),
    )
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html.encode(), policy)


class _View:
    """What the template goes through."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def tags(self) -> dict[str, list[dict[str, Any]]]:
        """The operations of each tag; HEAD and OPTIONS go without saying."""
        names = [tag["name"] for tag in self._document["tags"]]
        names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                if method not in ("head", "options"):
                    found[operation["tags"][0]].append(self._operation(path, method, operation))
        return {tag: operations for tag, operations in found.items() if operations}

    def schemas(self) -> dict[str, dict[str, Any]]:
        """The named schemas; of each property, whether it is required."""
        return dict(sorted(self._document["components"]["schemas"].items()))

    def _operation(self, path: str, method: str, operation: Mapping[str, Any]) -> dict[str, Any]:
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        return {
            "id": operation["operationId"],
            "path": path,
            "method": method.upper(),
            "summary": operation["summary"],
            "parameters": operation["parameters"],
            "request": body,
            "properties": self._properties(body["schema"]) if body else {},
            "responses": [(status, self._resolved(each)) for status, each in operation["responses"].items()],
            "curl": self._curl(path, method, body, operation),
        }

    def _properties(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        found = self._resolved(schema)
        required = found.get("required", ())
        properties = {
            name: {**each, "required": name in required} for name, each in found.get("properties", {}).items()
        }
        # What must be given comes first, what is known only to be refused last.
        return dict(sorted(properties.items(), key=lambda item: (_is_idle(item[1]), not item[1]["required"])))

    def _resolved(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in value:
            kind, name = value["$ref"].removeprefix(_REFERENCE).split("/", 1)
            value = self._document["components"][kind][name]
        return value

    def _curl(self, path: str, method: str, body: Mapping[str, Any] | None, operation: Mapping[str, Any]) -> str:
        parts = ["curl"]
        if method != "get":
            parts += ["-X", method.upper()] if body is None else []
        parts.append(f"http://localhost:8000{path}")
        lines = [" ".join(parts)]
        if self._document.get("security") and operation.get("security") != []:
            lines.append('-H "Authorization: Bearer $TAILRACE_KEY"')
        if body is not None:
            lines.append("-H 'Content-Type: application/json'")
            lines.append(f"-d {shlex.quote(json.dumps(body.get('example', {}), ensure_ascii=False))}")
        return " \\\n  ".join(lines)


def _is_idle(schema: Mapping[str, Any]) -> bool:
    return str(schema.get("description", "")).startswith((NOT_SUPPORTED, NO_INFLUENCE))


def anchor(name: str) -> str:
    """Return the id of a schema's place on the page."""
    return f"schema-{name}"


def code(text: str) -> Markup:
    """Return a text whose words in backquotes are code; all else is escaped."""
    parts = [
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(text.split("`"))
    ]
    return Markup("").join(parts)


def shape(schema: Mapping[str, Any]) -> Markup:
    """Return a schema in few words, with links to the schemas that have names."""
    return Markup("").join(_words(schema))


def _words(schema: Mapping[str, Any]) -> Iterator[Markup | str]:
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield Markup('<a href="#{}">{}</a>').format(anchor(name), name)
    elif "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        yield escape(" | ".join(json.dumps(value, ensure_ascii=False) for value in values))
    elif alternatives and "properties" not in schema:
        for place, each in enumerate(alternatives):
            yield escape(" or ") if place else ""
            yield from _words(each)
    elif schema.get("type") == "array":
        yield escape("list of ")
        yield from _words(schema.get("items", {}))
        yield escape(_bounds(schema, "minItems", "maxItems", "items"))
    elif schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        yield escape("object of ")
        yield from _words(schema["additionalProperties"])
    else:
        kind = schema.get("type", "any value")
        yield escape(kind if isinstance(kind, str) else " or ".join(kind))
        yield escape(_bounds(schema, "minLength", "maxLength", "characters") + _range(schema))


def _bounds(schema: Mapping[str, Any], low: str, high: str, unit: str) -> str:
    least, most = schema.get(low), schema.get(high)
    if least is None and most is None:
        return ""
    return f" ({least or 0} to {most} {unit})" if most is not None else f" (at least {least} {unit})"


def _range(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{word} {schema[name]}" for name, word in words.items() if name in schema]
    return f" ({' '.join(found)})" if found else ""
