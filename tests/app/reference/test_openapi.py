"""/openapi.json describes every route, and /docs shows it without scripts and without anything from elsewhere."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from flask import Flask
from flask.testing import FlaskClient

from app.api.reference.describe import description_of
from app.api.reference.openapi import routes
from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool


@pytest.fixture
def app(runtime: Path) -> Iterator[Flask]:
    with application(runtime) as made:
        yield made


@pytest.fixture
def document(app: Flask) -> dict[str, Any]:
    return app.test_client().get("/openapi.json").get_json()


def test_every_rule_with_every_method_is_there(app: Flask, document: dict[str, Any]) -> None:
    expected = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
    }
    found = {(path, method) for path, operations in document["paths"].items() for method in operations}
    assert found == expected


def test_every_view_describes_itself(app: Flask) -> None:
    assert [route.path for route in routes(app) if route.own_view and description_of(route.view) is None] == []


def test_every_body_that_is_read_is_described(document: dict[str, Any]) -> None:
    bodiless = {"/v1/responses/{response_id}/cancel"}
    posts = {path for path, operations in document["paths"].items() if "requestBody" not in operations.get("post", {})}
    with_post = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posts & with_post == bodiless


def test_operation_ids_are_unique_and_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    ids = [each["operationId"] for operations in document["paths"].values() for each in operations.values()]
    assert len(ids) == len(set(ids))
    for reference in references(document):
        place: Any = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_the_examples_are_answered(client: FlaskClient, pool: ScriptedPool) -> None:
    from tests.spec.conftest import answer_at_once

    pool.reply = answer_at_once
    document = client.get("/openapi.json").get_json()
    seen = 0
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in body and "{" not in path:
            response = client.post(path, json=body["example"])
            assert response.status_code == 200, (path, response.text)
            seen += 1
    assert seen >= 8


def test_unknown_fields_are_described_as_they_are_treated(runtime: Path) -> None:
    for strict in (False, True):
        with application(runtime, strict=strict) as app:
            found = app.test_client().get("/openapi.json").get_json()["components"]["schemas"]["ChatRequest"]
            assert found["additionalProperties"] is not strict


def test_keys_are_described_when_they_are_needed(runtime: Path, document: dict[str, Any]) -> None:
    assert "security" not in document
    assert "securitySchemes" not in document["components"]
    with application(runtime, api_key=["me=secret-key-1"]) as app:
        client = app.test_client()
        assert client.get("/openapi.json").status_code == 401
        found = client.get("/openapi.json", headers={"Authorization": "Bearer secret-key-1"}).get_json()
        assert found["security"] == [{name: []} for name in found["components"]["securitySchemes"]]
        opened = {
            path for path, operations in found["paths"].items() if operations.get("get", {}).get("security") == []
        }
        assert opened == {"/livez", "/readyz"}
        assert "secret-key-1" not in str(found)
        page = client.get("/docs", headers={"x-api-key": "secret-key-1"}).text
        assert "Authorization: Bearer" in page


@pytest.mark.parametrize("url", ["/openapi.json", "/docs"])
def test_what_has_not_changed_is_not_sent_again(app: Flask, url: str) -> None:
    client = app.test_client()
    first = client.get(url)
    again = client.get(url, headers={"If-None-Match": first.headers["ETag"]})
    assert (first.status_code, again.status_code, again.data) == (200, 304, b"")
    assert client.get(url).data == first.data


class Page(HTMLParser):
    """What is in a page, and whether its tags are closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(app: Flask, document: dict[str, Any]) -> None:
    response = app.test_client().get("/docs")
    assert response.content_type == "text/html; charset=utf-8"
    page = Page(response.text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "form"}
    assert not any(name.startswith("on") or name in ("src", "style") for _, each in page.tags for name in each)
    targets = page.values("href")
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in targets if target.startswith("#")} <= set(ids)
    assert {target for target in targets if not target.startswith("#")} == {"/openapi.json"}
    own = {
        each["operationId"]
        for operations in document["paths"].values()
        for method, each in operations.items()
        if method not in ("head", "options")
    }
    assert own <= set(ids)
    assert {f"schema-{name}" for name in document["components"]["schemas"]} <= set(ids)


def test_the_page_allows_nothing_but_its_own_style(app: Flask) -> None:
    policy = app.test_client().get("/docs").headers["Content-Security-Policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("style-src").startswith("'sha256-")
    assert set(directives.values()) == {"'none'"}
    assert "default-src" in directives


def test_what_is_written_into_the_page_is_escaped(app: Flask, document: dict[str, Any]) -> None:
    from app.api.reference.page import page

    bad = "<script>alert(1)</script> `<b>`"
    document["info"]["description"] = bad
    document["components"]["schemas"]["ChatRequest"]["properties"]["top_k"]["description"] = bad
    shown = page(document).html.decode()
    assert "<script" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown
