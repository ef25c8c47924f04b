"""What the application answers to whom: keys, limits, names, web pages, request ids."""

import logging
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app.door import visitor
from app.text.offload import off_hub
from config.logs import request_label
from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, eventually, refusal, silent, tokens, vectors
from tests.app.tiny import IM_END, ids_of
from tests.spec.conftest import answer_at_once
from workers.messages import Output

CHAT = "/v1/chat/completions"
ALICE, BOB = "alice-0123456789", "bob-0123456789"
AS_ALICE = {"Authorization": f"Bearer {ALICE}"}
AS_BOB = {"Authorization": f"Bearer {BOB}"}
ASK = {"messages": "x", "max_tokens": 5}


class Client(FlaskClient):
    """Reads each answer to its end, as a server does, unless it is told not to."""

    def open(self, *args: Any, buffered: bool = True, **options: Any) -> Any:
        return super().open(*args, buffered=buffered, **options)


@pytest.fixture
def make(runtime: Path, pool: ScriptedPool) -> Iterator[Any]:
    """Make the application with settings; with keys, unless others are given."""
    pool.reply = tokens(ids_of("ok"), stop=IM_END)
    with ExitStack() as stack:

        def made(**settings: object) -> FlaskClient:
            settings.setdefault("api_key", [f"alice={ALICE}", f"bob={BOB}"])
            client = Client(stack.enter_context(application(runtime, **settings)))
            eventually(lambda: client.get("/readyz").status_code == 200)
            return client

        yield made


def every_route(app: Flask) -> set[tuple[str, str]]:
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
    paths = {
        rule.rule.replace("<path:name>", "tiny").replace("<", "x").replace(">", "") for rule in app.url_map.iter_rules()
    }
    return {(method, path) for method in methods for path in paths | {"/nowhere", "/", "//livez", "/livez/", "/LIVEZ"}}


def test_every_route_and_method_needs_a_key_but_two(make: Any):
    client = make()
    for method, path in sorted(every_route(client.application)):
        answer = client.open(path, method=method)
        if method == "GET" and path in ("/livez", "/readyz"):
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"].split(",")[0] == "Bearer"
            assert method == "HEAD" or answer.get_json()["error"]


def test_with_a_key_the_rest_is_answered_as_ever(make: Any):
    client = make()
    assert client.get("/v1/models", headers=AS_ALICE).status_code == 200
    assert client.get("/v1/models", headers={"x-api-key": ALICE}).status_code == 200
    assert client.get("/nowhere", headers=AS_ALICE).status_code == 404
    assert client.delete(CHAT, headers=AS_ALICE).status_code == 405
    assert client.post(CHAT, json=ASK, headers=AS_ALICE).status_code == 200


def test_without_any_key_everything_is_open(make: Any):
    client = make(api_key=[])
    assert client.get("/health").status_code == 200
    assert client.post(CHAT, json=ASK, headers={"Authorization": "Bearer none"}).status_code == 200


def test_a_key_is_never_looked_for_in_the_body_or_the_url(make: Any, pool: ScriptedPool):
    client = make()
    answer = client.post(f"{CHAT}?api_key={ALICE}", json={**ASK, "api_key": ALICE})
    assert answer.status_code == 401
    assert "not taken from the URL" in answer.get_json()["error"]["message"]
    assert ALICE not in answer.text
    assert pool.jobs == []


@pytest.mark.parametrize("path", ["/livez", "/v1/models/../../livez", "/v1/models;/livez", "/v1/models?x=/livez"])
def test_nothing_but_method_and_path_opens_a_route(make: Any, path: str):
    client = make()
    headers = {
        "Host": "localhost",
        "X-Original-URL": "/livez",
        "X-Rewrite-URL": "/livez",
        "X-Forwarded-Prefix": "/livez",
        "X-HTTP-Method-Override": "GET",
    }
    assert client.post(path, headers=headers).status_code == 401
    if path != "/livez":
        assert client.get(path, headers=headers).status_code == 401


def test_requests_of_two_owners_have_two_salts_and_all_keys_of_one_the_same(make: Any, pool: ScriptedPool):
    client = make(api_key=[f"alice={ALICE}", f"bob={BOB}", "alice=alice-new"])
    for key in (ALICE, BOB, "alice-new"):
        assert client.post(CHAT, json=ASK, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    pool.reply = vectors(lambda job: array("f", [1.0] + [0.0] * 7).tobytes())
    headers = {"Authorization": f"Bearer {BOB}"}
    assert client.post("/v1/embeddings", json={"input": "Hello"}, headers=headers).status_code == 200
    assert [job.salt for job in pool.jobs] == ["alice", "bob", "alice", "bob"]


# --- limits


def test_requests_per_minute_are_told_and_held_to(make: Any):
    client = make(key_requests_per_minute=2)
    for left in ("1", "0"):
        answer = client.post(CHAT, json=ASK, headers=AS_ALICE)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    answer = client.get("/v1/models", headers=AS_ALICE)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    error = answer.get_json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert client.get("/v1/models", headers=AS_BOB).status_code == 200


def test_a_request_is_open_until_its_last_byte_is_out(make: Any, pool: ScriptedPool):
    client = make(key_max_concurrent=1)
    stream = client.post(CHAT, json={**ASK, "stream": True}, headers=AS_ALICE, buffered=False)
    assert stream.status_code == 200
    assert client.get("/v1/models", headers=AS_ALICE).status_code == 429
    assert client.get("/v1/models", headers=AS_BOB).status_code == 200
    assert b"[DONE]" in stream.get_data()
    stream.close()
    for _ in range(3):
        assert client.get("/v1/models", headers=AS_ALICE).status_code == 200
        assert client.get("/nowhere", headers=AS_ALICE).status_code == 404
        assert client.post(CHAT, data="{", headers=AS_ALICE).status_code == 400


def test_what_goes_on_in_the_background_is_still_open(make: Any, pool: ScriptedPool, tmp_path: Path):
    client = make(key_max_concurrent=1, state_dir=tmp_path)
    pool.reply = silent
    answer = client.post("/v1/responses", json={"input": "x", "background": True}, headers=AS_ALICE)
    assert answer.status_code == 200
    job = pool.next_job()
    assert client.get("/v1/models", headers=AS_ALICE).status_code == 429
    pool.send(Output(id=job.id, choice=0, ids=ids_of("ok"), finish_reason="stop", stop_token_id=IM_END))
    eventually(lambda: client.get("/v1/models", headers=AS_ALICE).status_code == 200)


def test_a_request_that_fails_for_a_reason_of_ours_is_not_open_for_ever(make: Any, monkeypatch: pytest.MonkeyPatch):
    client = make(key_max_concurrent=1)
    monkeypatch.setattr("app.api.models.describe", lambda *_: 1 / 0)
    for _ in range(2):
        assert client.get("/v1/models", headers=AS_ALICE).status_code == 500


def test_tokens_are_reserved_and_what_was_not_used_given_back(make: Any, pool: ScriptedPool):
    client = make(key_tokens_per_minute=1000)
    answer = client.post(CHAT, json={**ASK, "max_tokens": 300}, headers=AS_ALICE)
    usage = answer.get_json()["usage"]
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    reserved = 1000 - int(answer.headers["x-ratelimit-remaining-tokens"])
    assert usage["prompt_tokens"] + 295 <= reserved <= usage["prompt_tokens"] + 301
    left = int(client.get("/v1/models", headers=AS_ALICE).headers["x-ratelimit-remaining-tokens"])
    assert 1000 - usage["total_tokens"] - 1 <= left < 1000


def test_a_request_whose_tokens_are_not_there_is_refused_before_any_work(make: Any, pool: ScriptedPool):
    client = make(key_tokens_per_minute=1000)
    stream = client.post(CHAT, json={**ASK, "max_tokens": 600, "stream": True}, headers=AS_ALICE, buffered=False)
    answer = client.post(CHAT, json={**ASK, "max_tokens": 600}, headers=AS_ALICE)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 10
    assert len(pool.jobs) == 1
    stream.get_data()
    stream.close()
    assert client.post(CHAT, json={**ASK, "max_tokens": 600}, headers=AS_ALICE).status_code == 200


def test_a_prompt_of_more_than_a_minutes_tokens_need_not_be_tried_again(make: Any):
    answer = make(key_tokens_per_minute=20).post(CHAT, json={"messages": "x" * 100}, headers=AS_ALICE)
    assert answer.status_code == 429
    assert answer.headers["X-Should-Retry"] == "false"


def test_a_refused_job_uses_no_tokens(make: Any, pool: ScriptedPool):
    client = make(key_tokens_per_minute=1000)
    pool.reply = refusal("overloaded", retry_after=3)
    assert client.post(CHAT, json={**ASK, "max_tokens": 300}, headers=AS_ALICE).status_code == 429
    assert client.get("/v1/models", headers=AS_ALICE).headers["x-ratelimit-remaining-tokens"] == "1000"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["one text", "another"]}),
        ("/v1/score", {"text_1": "one text", "text_2": "another"}),
        ("/v1/rerank", {"query": "one text", "documents": ["another"], "method": "log_likelihood"}),
    ],
)
def test_what_is_only_read_uses_its_tokens_if_it_has_begun(
    make: Any, pool: ScriptedPool, path: str, body: dict[str, Any]
):
    client = make(key_tokens_per_minute=1000)

    def left() -> int:
        return int(client.get("/v1/models", headers=AS_ALICE).headers["x-ratelimit-remaining-tokens"])

    pool.reply = refusal("overloaded", retry_after=3)
    assert client.post(path, json=body, headers=AS_ALICE).status_code == 429
    assert left() == 1000
    pool.reply = answer_at_once
    answer = client.post(path, json=body, headers=AS_ALICE)
    assert answer.status_code == 200
    # What comes back meanwhile is some tokens a second.
    assert left() < 1000


# --- addresses that try keys


def test_an_address_that_tries_keys_is_refused_and_no_other(make: Any):
    client = make(bad_keys_per_minute=3)
    bad = {"Authorization": "Bearer guess"}

    def status(headers: dict[str, str], address: str = "198.51.100.7") -> int:
        return client.get("/v1/models", headers=headers, environ_base={"REMOTE_ADDR": address}).status_code

    assert [status(bad) for _ in range(5)] == [401, 401, 401, 429, 429]
    # A right key from there could be the lucky guess.
    assert status(AS_ALICE) == 429
    assert status(AS_ALICE, "198.51.100.8") == 200
    # Behind the proxy: the last entry is the proxy's own word.
    assert status({**AS_ALICE, "X-Forwarded-For": "203.0.113.1, 198.51.100.7"}, "127.0.0.1") == 429
    assert status({**AS_ALICE, "X-Forwarded-For": "198.51.100.7, 203.0.113.1"}, "127.0.0.1") == 200
    # Nobody else is believed.
    assert status({**AS_ALICE, "X-Forwarded-For": "203.0.113.1"}) == 429
    assert status({**AS_ALICE, "X-Forwarded-For": "198.51.100.7"}, "198.51.100.9") == 200


def test_a_request_without_a_key_is_no_guess(make: Any):
    client = make(bad_keys_per_minute=1)
    assert [client.get("/v1/models").status_code for _ in range(5)] == [401] * 5
    assert client.get("/v1/models", headers=AS_ALICE).status_code == 200


def test_one_customer_of_ipv6_is_one_address(make: Any):
    client = make(bad_keys_per_minute=1)
    for last, status in (("1", 401), ("2", 429)):
        environ = {"REMOTE_ADDR": f"2001:db8::{last}"}
        assert client.get("/version", headers={"x-api-key": "guess"}, environ_base=environ).status_code == status
    assert client.get("/version", headers=AS_BOB, environ_base={"REMOTE_ADDR": "2001:db8:0:1::1"}).status_code == 200


# --- names


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:19327", "127.0.0.1:1", "[::1]:80", "gpubox", "a.localhost", "192.0.2.1"]
)
def test_local_names_and_addresses_are_always_fine(make: Any, host: str):
    assert make(api_key=[]).get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:19327", "127.0.0.1.evil.example", "localhost.evil.example."]
)
def test_a_server_on_loopback_without_keys_answers_to_no_other_name(make: Any, host: str):
    answer = make(api_key=[]).get("/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.get_json()["error"]["code"] == "host_not_allowed"


def test_names_can_be_allowed(make: Any):
    client = make(api_key=[], allowed_hosts=["llm.example.org", ".example.net"])
    statuses = [
        client.get("/livez", headers={"Host": host}).status_code
        for host in ("LLM.example.org:443", "a.b.example.net", "example.net", "x.llm.example.org", "evil.example")
    ]
    assert statuses == [200, 200, 403, 403, 403]


@pytest.mark.parametrize("settings", [{}, {"api_key": [], "host": "0.0.0.0"}, {"api_key": [], "allowed_hosts": ["*"]}])
def test_with_keys_or_for_the_world_any_name_will_do(make: Any, settings: dict[str, Any]):
    assert make(**settings).get("/livez", headers={"Host": "llm.example.org"}).status_code == 200


@pytest.mark.parametrize("host", ["x/v1?a=", "a b", "a,b", "a@b", "x:port", "[::1", "\xe4", "x:123456"])
def test_what_is_no_name_at_all_is_a_400(make: Any, host: str):
    answer = make().get("/livez", environ_overrides={"HTTP_HOST": host})
    assert answer.status_code == 400
    assert answer.get_json()["error"]["type"] == "invalid_request_error"


# --- web pages


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


@pytest.mark.parametrize("settings", [{}, {"api_key": []}, {"cors_origins": ["https://app.example.org"]}])
def test_no_page_of_a_foreign_site_may_read_anything(make: Any, settings: dict[str, Any]):
    client = make(**settings)
    origin = {"Origin": "https://evil.example"}
    for answer in (
        client.options(CHAT, headers={**origin, **PREFLIGHT}),
        client.get("/livez", headers=origin),
        client.post(CHAT, json=ASK, headers={**origin, **AS_ALICE}),
        client.post(CHAT, json=ASK, headers=origin),
    ):
        assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]


def test_a_page_that_is_allowed_may_ask_without_a_key_what_it_may_do(make: Any):
    client = make(cors_origins=["https://app.example.org"])
    origin = {"Origin": "https://app.example.org"}
    answer = client.options(CHAT, headers={**origin, **PREFLIGHT})
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.org"
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in answer.headers
    for path, headers, status in ((CHAT, {}, 401), (CHAT, AS_ALICE, 200)):
        answer = client.post(path, json=ASK, headers={**origin, **headers})
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.org"
        assert "Origin" in answer.headers["Vary"]
        exposed = answer.headers["Access-Control-Expose-Headers"]
        for name in ("x-ratelimit-limit-requests", "X-Should-Retry", "X-Tailrace-Stream", "Idempotent-Replayed"):
            assert name in exposed
    # OPTIONS that is no preflight is an ordinary request.
    assert client.options(CHAT, headers=origin).status_code == 401
    assert "Origin" in client.get("/livez").headers["Vary"]


def test_any_page_may_be_allowed_but_never_with_credentials(make: Any):
    client = make(cors_origins=["*"])
    answer = client.post(CHAT, json=ASK, headers={"Origin": "https://any.example", **AS_ALICE})
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_without_keys_a_page_of_another_site_cannot_even_ask(make: Any, pool: ScriptedPool):
    client = make(api_key=[])

    def status(origin: str, **headers: str) -> int:
        return client.post(CHAT, data=b'{"messages":"x"}', headers={"Origin": origin, **headers}).status_code

    assert status("https://evil.example") == 403
    assert status("null") == 403
    assert pool.jobs == []
    assert status("http://localhost:5173") == 200
    assert status("http://192.0.2.1:19327", Host="192.0.2.1:19327") == 200
    assert status("vscode-webview://abc") == 200


# --- ids and headers


@pytest.mark.parametrize("asked", ["a" * 128, "Abc_-9"])
def test_a_well_formed_request_id_is_echoed(make: Any, asked: str):
    answer = make().get("/v1/models", headers={"X-Request-Id": asked, **AS_ALICE})
    assert answer.headers["X-Request-Id"] == asked


@pytest.mark.parametrize("asked", ["", "a" * 129, "a b", "\xe4", "a\x1b[31m", "x" * 10_000])
def test_another_one_is_replaced(make: Any, asked: str):
    answer = make().get("/v1/models", environ_overrides={"HTTP_X_REQUEST_ID": asked})
    assert answer.status_code == 401
    assert answer.headers["X-Request-Id"].startswith("req_")


def test_every_answer_keeps_browsers_from_guessing_its_type(make: Any):
    client = make()
    for path, headers in (("/livez", {}), ("/v1/models", {}), ("/nowhere", AS_ALICE), ("/v1/models", AS_ALICE)):
        assert client.get(path, headers=headers).headers["X-Content-Type-Options"] == "nosniff"


class Labels(logging.Handler):
    """Notes what each line is labelled with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((request_label.get(), record.getMessage()))


@pytest.fixture
def labels() -> Iterator[Labels]:
    handler = Labels()
    logger = logging.getLogger("tailrace.requests")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("stream", [False, True])
def test_every_line_of_a_request_has_its_id_and_its_owners_name(make: Any, labels: Labels, stream: bool):
    client = make()
    labels.seen.clear()
    answer = client.post(CHAT, json={**ASK, "stream": stream}, headers={"X-Request-Id": "mine", **AS_ALICE})
    assert answer.status_code == 200
    assert {label for label, _ in labels.seen} == {"mine alice"}
    assert [message for _, message in labels.seen] == ["accepted", "first token", "finished"]
    assert request_label.get() == ""
    assert visitor.current() is None


def test_lines_from_other_threads_and_greenlets_belong_to_their_request_too():
    import gevent

    visitor.begin(visitor.Visitor("mine", "127.0.0.1", ""))
    try:
        assert off_hub(request_label.get) == "mine"
        assert gevent.spawn(visitor.carried(request_label.get)).get() == "mine"
        assert gevent.spawn(request_label.get).get() == ""
    finally:
        current = visitor.current()
        assert current is not None
        current.leave()
