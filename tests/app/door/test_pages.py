"""Pages for people: a browser asks for the key as for a password, and shows it as one, there and nowhere else."""

import base64
from pathlib import Path
from typing import Any

import pytest

from app.door.keys import PAGES
from tests.app.conftest import application

KEY = "sk-people"


def basic(words: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(words.encode()).decode()}


@pytest.fixture
def guarded(runtime: Path) -> Any:
    with application(runtime, api_key=[f"alice={KEY}"], bad_keys_per_minute=1000) as app:
        yield app


def test_every_page_has_a_route(guarded: Any):
    assert {rule.rule for rule in guarded.url_map.iter_rules()} >= PAGES


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_is_closed_and_lets_the_browser_ask(guarded: Any, page: str):
    answer = guarded.test_client().get(page)
    assert answer.status_code == 401
    bearer, password = answer.headers.getlist("WWW-Authenticate")
    assert bearer == "Bearer"
    assert password.startswith("Basic realm=")


@pytest.mark.parametrize("name", ["", "alice", "anybody"])
def test_the_key_is_the_password(guarded: Any, name: str):
    assert guarded.test_client().get("/status", headers=basic(f"{name}:{KEY}")).status_code == 200


@pytest.mark.parametrize("words", [f"{KEY}:", KEY, f"alice:{KEY}x", f"alice:{KEY}:", "alice:", ":"])
def test_anything_else_is_no_key(guarded: Any, words: str):
    assert guarded.test_client().get("/status", headers=basic(words)).status_code == 401


def test_what_is_no_base64_is_no_key(guarded: Any):
    answer = guarded.test_client().get("/status", headers={"Authorization": "Basic \xfc\xfc"})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/status")],
)
def test_a_password_opens_nothing_else(guarded: Any, method: str, path: str):
    answer = guarded.test_client().open(path, method=method, headers=basic(f"alice:{KEY}"))
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_wrong_passwords_are_counted_as_wrong_keys_are(runtime: Path):
    with application(runtime, api_key=[f"alice={KEY}"], bad_keys_per_minute=3) as app:
        client = app.test_client()
        statuses = [client.get("/status", headers=basic("alice:wrong")).status_code for _ in range(6)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
