"""Models, tokens, health, and what is answered while there is no model."""

import json
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, eventually, tokens
from tests.app.tiny import IM_END, ids_of, write_card
from workers.messages import PoolStatus

CHAT = "/v1/chat/completions"


def test_models_are_listed_under_every_name(runtime: Path) -> None:
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, adapters=["my-lora"])).start()
    pool.reply = tokens([], stop=IM_END)
    with application(runtime) as app:
        client = app.test_client()
        models = client.get("/v1/models").get_json()
        assert models["object"] == "list"
        assert [each["id"] for each in models["data"]] == ["tiny", "tiny-alias", "llama-3-chinese", "my-lora"]
        assert client.get("/v1/models/my-lora").get_json() == {
            "id": "my-lora",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "tailrace",
            "root": "tiny",
            "parent": "tiny",
            "max_model_len": 2048,
        }
        assert client.get("/v1/models/a/b").get_json()["error"]["code"] == "model_not_found"
        assert client.post(CHAT, json={"messages": "x", "model": "my-lora"}).status_code == 200
        assert client.post(CHAT, json={"messages": "x", "model": "llama-3-chinese"}).status_code == 200
    pool.stop()
    assert [job.adapter for job in pool.jobs] == ["my-lora", ""]  # type: ignore[union-attr]


def test_tokens_of_a_text_and_back(client: FlaskClient) -> None:
    text = "你好 <|im_end|> world"
    answer = client.post("/tokenize", json={"prompt": text}).get_json()
    assert answer == {"tokens": ids_of(text), "count": len(ids_of(text)), "max_model_len": 2048}
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).get_json() == {"prompt": text}
    for bad in ({}, {"tokens": "x"}, {"tokens": [420]}, {"tokens": [True]}):
        assert client.post("/detokenize", json=bad).get_json()["error"]["param"] == "tokens"


def test_tokens_of_a_conversation_are_those_of_its_prompt(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    messages = [{"role": "user", "content": "如何?"}]
    counted = client.post("/tokenize", json={"messages": messages}).get_json()
    client.post(CHAT, json={"messages": messages})
    assert counted["tokens"] == pool.jobs[0].prompt
    assert client.post("/tokenize", json={}).status_code == 400


def test_alive_and_version_need_nobody(runtime: Path) -> None:
    with application(runtime) as app:
        client = app.test_client()
        assert client.get("/livez").get_json() == {"status": "ok"}
        assert client.get("/version").get_json()["version"]


def test_ready_with_the_detail_of_each_worker(client: FlaskClient) -> None:
    assert client.get("/v1/models").status_code == 200
    assert client.get("/readyz").get_json() == {"status": "ready"}
    health = client.get("/health").get_json()
    assert health["status"] == "ready"
    assert health["workers"][0]["state"] == "ready"
    assert health["workers"][0]["device"] == "cpu"


@pytest.mark.parametrize("url", ["/readyz", "/health", "/v1/models", CHAT])
def test_while_the_model_loads_everything_says_so(runtime: Path, url: str) -> None:
    pool = ScriptedPool(runtime / "pool.sock", None).start()
    with application(runtime) as app:
        client = app.test_client()
        response = client.post(url, json={"messages": "x"}) if url == CHAT else client.get(url)
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert "loading (42%)" in response.text
        if url.startswith("/v1"):
            assert response.get_json()["error"]["type"] == "service_unavailable_error"
        # and as soon as it is loaded, it is served
        pool.tell(ScriptedPool._status(write_card(runtime)))
        eventually(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/v1/models").status_code == 200
    pool.stop()


def test_without_a_pool_requests_are_refused_and_with_a_new_one_served(runtime: Path) -> None:
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime))
    pool.reply = tokens(ids_of("ok"), stop=IM_END)
    with application(runtime) as app:
        client = app.test_client()
        response = client.post(CHAT, json={"messages": "x"})
        assert (response.status_code, response.get_json()["error"]["type"]) == (503, "service_unavailable_error")
        assert client.get("/readyz").status_code == 503
        for _ in range(2):
            pool.start()
            eventually(lambda: client.get("/readyz").status_code == 200)
            assert client.post(CHAT, json={"messages": "x"}).status_code == 200
            pool.stop()
            eventually(lambda: client.get("/readyz").status_code == 503)


def test_a_pool_that_does_not_answer_is_not_ready(client: FlaskClient, pool: ScriptedPool) -> None:
    assert client.get("/v1/models").status_code == 200
    pool.answers_queries = False
    response = client.get("/readyz")
    assert response.status_code == 503
    assert "does not answer" in response.get_json()["reason"]
    assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(
    ("changes", "reason"), [({"ready": False}, "No model worker is ready"), ({"draining": True}, "shutting down")]
)
def test_not_ready_says_why(client: FlaskClient, pool: ScriptedPool, changes: dict[str, bool], reason: str) -> None:
    assert client.get("/v1/models").status_code == 200
    pool.tell(ScriptedPool._status(Path(pool.status.card_path or ""), **changes))
    response = client.get("/health")
    assert response.status_code == 503
    assert reason in response.get_json()["reason"]


def test_while_a_worker_is_replaced_requests_are_still_taken(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    pool.tell(ScriptedPool._status(Path(pool.status.card_path or ""), ready=False))
    assert client.post(CHAT, json={"messages": "x"}).status_code == 200


def test_another_model_is_taken_over_with_its_card(client: FlaskClient, pool: ScriptedPool, runtime: Path) -> None:
    assert client.get("/v1/models").get_json()["data"][0]["id"] == "tiny"
    status: PoolStatus = ScriptedPool._status(write_card(runtime, id="other"))
    pool.tell(status)
    eventually(lambda: client.get("/v1/models").get_json()["data"][0]["id"] == "other")


@pytest.mark.parametrize("damage", ["card", "tokenizer"])
def test_a_damaged_card_is_not_ready_and_no_crash(runtime: Path, damage: str) -> None:
    card = write_card(runtime)
    broken = card if damage == "card" else Path(json.loads(card.read_text())["tokenizer_path"])
    broken.write_text("{")
    pool = ScriptedPool(runtime / "pool.sock", card).start()
    with application(runtime) as app:
        client = app.test_client()
        eventually(lambda: "cannot be read" in client.get("/readyz").text)
        response = client.post(CHAT, json={"messages": "x"})
        assert response.status_code == 503
        assert str(runtime) not in response.text
    pool.stop()
