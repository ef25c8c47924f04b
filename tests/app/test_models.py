"""Names of models, and the tokens of texts and conversations, through the application in this process."""

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, tokens, vectors
from tests.app.tiny import IM_END, ids_of, tokenizer, write_card

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
MESSAGES = [{"role": "user", "content": "如何?"}]


def test_a_name_is_found_however_its_characters_are_written(runtime: Path) -> None:
    names = ["meta-llama/Llama-3", "模型 v1.0", "a+b&c?d#e"]
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, names=names)).start()
    with application(runtime) as app:
        client = app.test_client()
        listed = [model["id"] for model in client.get("/v1/models").get_json()["data"]]
        assert listed == ["tiny", *names, "llama-3-chinese"]
        for url, name in {
            "meta-llama/Llama-3": names[0],
            "meta-llama%2FLlama-3": names[0],
            "%E6%A8%A1%E5%9E%8B%20v1.0": names[1],
            "a+b&c%3Fd%23e": names[2],
        }.items():
            answer = client.get(f"/v1/models/{url}")
            assert (answer.status_code, answer.get_json()["id"]) == (200, name)
    pool.stop()


def test_anthropics_client_gets_the_list_in_its_own_shape(client: FlaskClient) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    listed = client.get("/v1/models", headers=headers).get_json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "tiny-alias", "llama-3-chinese"]
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "tiny", "llama-3-chinese")
    entry = client.get("/v1/models/tiny-alias", headers=headers).get_json()
    assert entry == listed["data"][1]
    assert (entry["type"], entry["created_at"]) == ("model", "2023-11-14T22:13:20Z")


@pytest.mark.parametrize("name", ["nobody", "meta-llama/nobody", "tiny/", "TINY", "%00", "%FF", "x" * 3000])
def test_another_name_is_not_found(client: FlaskClient, name: str) -> None:
    answer = client.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    error = answer.get_json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert len(error["message"]) < 200
    assert client.post("/v1/models/tiny").status_code == 405


def test_tokens_have_their_strings_when_asked(client: FlaskClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "Hello, 世界", "return_token_strs": True}).get_json()
    assert answer["token_strs"] == tokenizer().encode("Hello, 世界", add_special_tokens=False).tokens
    assert "token_strs" not in client.post("/tokenize", json={"prompt": "Hello"}).get_json()


def test_tokens_of_a_conversation_with_tools_are_those_of_its_prompt(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {"messages": MESSAGES, "tools": [TOOL]}
    counted = client.post("/tokenize", json={**body, "return_token_strs": True}).get_json()
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert counted["tokens"] == pool.jobs[0].prompt
    assert "clock" in tokenizer().decode(counted["tokens"])
    assert len(counted["token_strs"]) == counted["count"] == len(counted["tokens"])
    assert (
        client.post("/detokenize", json={"tokens": counted["tokens"]}).get_json()["prompt"].startswith("<|im_start|>")
    )


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools[0].function"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, "model"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [[1]]}, "tokens"),
        ("/detokenize", {"tokens": None}, "tokens"),
    ],
)
def test_a_bad_field_is_named(client: FlaskClient, url: str, body: dict[str, Any], param: str) -> None:
    response = client.post(url, json=body)
    assert response.status_code in (400, 404), response.text
    assert (response.get_json()["error"]["param"] or "").startswith(param), response.text


def test_embeddings_take_every_field_of_openais_clients(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = vectors(lambda job: bytes(32))
    body = {"model": "tiny", "input": "Hello", "encoding_format": "float", "dimensions": 4, "user": "me"}
    answer = client.post("/v1/embeddings", json=body).get_json()
    assert "warnings" not in answer
    assert len(answer["data"][0]["embedding"]) == 4
    assert answer["usage"] == {"prompt_tokens": len(ids_of("Hello")), "total_tokens": len(ids_of("Hello"))}
