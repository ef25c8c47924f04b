"""Chat completions with ``store: true``: kept, listed, read, labelled, deleted."""

import re

import openai
import pytest

from tests.app.conftest import application
from tests.app.responses.conftest import REPLY, client_of
from tests.app.scripted_pool import scored
from tests.app.tiny import IM_END, ids_of

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture
def client(app, answering) -> openai.OpenAI:
    return client_of(app)


def chat(client: openai.OpenAI, **more):
    return client.chat.completions.create(model="tiny", messages=MESSAGES, store=True, **more)


def test_a_stored_completion_is_read_again_from_any_http_worker(client, other):
    made = chat(client, metadata={"a": "b"})
    assert made.choices[0].message.content == REPLY
    found = client_of(other).chat.completions.retrieve(made.id)
    assert found.choices == made.choices
    assert found.usage == made.usage
    assert found.metadata == {"a": "b"}


def test_a_streamed_one_is_kept_as_the_whole_that_it_was(client, http, pool):
    pool.reply = scored(ids_of(REPLY), stop=IM_END)
    more = {"n": 2, "logprobs": True, "top_logprobs": 1, "seed": 1}
    whole = chat(client, **more)
    chunks = list(chat(client, stream=True, **more))
    found = client.chat.completions.retrieve(chunks[0].id)
    assert found.choices == whole.choices
    assert found.usage == whole.usage
    assert len(found.choices) == 2


def test_what_is_not_to_be_stored_is_not(client, http):
    made = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert http.get(f"/v1/chat/completions/{made.id}").status_code == 404
    assert list(client.chat.completions.list()) == []


def test_they_are_listed_by_age_model_and_metadata(client):
    made = [chat(client, metadata={"n": str(n % 2)}).id for n in range(4)]
    made.append(client.chat.completions.create(model="tiny-alias", messages=MESSAGES, store=True).id)
    completions = client.chat.completions
    assert [each.id for each in completions.list(limit=2)] == made
    assert [each.id for each in completions.list(order="desc")] == made[::-1]
    assert [each.id for each in completions.list(after=made[2])] == made[3:]
    assert [each.id for each in completions.list(model="tiny-alias")] == made[4:]
    assert [each.id for each in completions.list(metadata={"n": "1"})] == [made[1], made[3]]
    for bad in ({"limit": 0}, {"order": "up"}, {"after": "x"}):
        with pytest.raises(openai.BadRequestError) as raised:
            completions.list(**bad)
        assert raised.value.param == next(iter(bad))


def test_its_metadata_can_be_replaced(client, http):
    made = chat(client, metadata={"a": "b"})
    changed = client.chat.completions.update(made.id, metadata={"c": "d"})
    assert changed.metadata == {"c": "d"}
    assert client.chat.completions.retrieve(made.id).metadata == {"c": "d"}
    assert [each.id for each in client.chat.completions.list(metadata={"c": "d"})] == [made.id]
    assert list(client.chat.completions.list(metadata={"a": "b"})) == []
    assert client.chat.completions.update(made.id, metadata=None).metadata == {}
    for bad in ({}, {"metadata": {"a": 1}}, {"metadata": 5}):
        answer = http.post(f"/v1/chat/completions/{made.id}", json=bad)
        assert (answer.status_code, answer.json["error"]["param"]) == (400, "metadata")


def test_its_messages_are_listed(client):
    made = chat(client)
    found = list(client.chat.completions.messages.list(made.id, limit=1))
    assert [(each.role, each.content) for each in found] == [("system", "Be brief."), ("user", "Hello")]
    assert len({each.id for each in found}) == 2
    assert [each.id for each in client.chat.completions.messages.list(made.id, order="desc")] == [
        each.id for each in found[::-1]
    ]
    assert [each.id for each in client.chat.completions.messages.list(made.id, after=found[0].id)] == [found[1].id]


def test_messages_are_listed_as_they_were_written(client, http):
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]
    call = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    made = client.chat.completions.create(model="tiny", messages=messages, store=True)
    found = http.get(f"/v1/chat/completions/{made.id}/messages").json["data"]
    assert [(each["content"], each["content_parts"]) for each in found] == [
        ("What\nnow?", parts),
        (None, None),
        ("noon", None),
    ]
    assert found[1]["tool_calls"] == [call]


def test_a_deleted_one_is_gone(client):
    made = chat(client)
    gone = client.chat.completions.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "chat.completion.deleted")
    for call in (
        client.chat.completions.retrieve,
        client.chat.completions.delete,
        client.chat.completions.messages.list,
        lambda each: client.chat.completions.update(each, metadata={}),
    ):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_it_belongs_to_the_keys_owner(runtime, answering):
    with application(runtime, api_key=["ann=sk-ann-0123456789abcdef", "bob=sk-bob-0123456789abcdef"]) as app:
        http = app.test_client()
        ann, bob = ({"Authorization": f"Bearer sk-{name}-0123456789abcdef"} for name in ("ann", "bob"))
        made = http.post("/v1/chat/completions", json={"messages": "x", "store": True}, headers=ann).json["id"]
        url = f"/v1/chat/completions/{made}"
        for method, path in (("GET", url), ("DELETE", url), ("GET", f"{url}/messages")):
            assert http.open(path, method=method, headers=bob).status_code == 404
        assert http.post(url, json={"metadata": {}}, headers=bob).status_code == 404
        assert http.get("/v1/chat/completions", headers=bob).json["data"] == []
        assert http.get(url, headers=ann).status_code == 200
        app.close()


def test_an_answer_that_cannot_be_kept_is_an_error(runtime, answering):
    (runtime / "file").write_text("")
    with application(runtime, state_dir=runtime / "file" / "state") as app:
        http = app.test_client()
        body = {"messages": "x", "store": True}
        answer = http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json["error"]["code"]) == (503, "store_unavailable")
        text = http.post("/v1/chat/completions", json={**body, "stream": True}).text
        assert '"store_unavailable"' in text.rstrip().rsplit("\n\n", 1)[-1]
        assert "[DONE]" not in text
        assert http.post("/v1/chat/completions", json={**body, "store": False}).status_code == 200


def test_a_server_that_stores_nothing_refuses(runtime, answering):
    with application(runtime, store_max_items=0) as app:
        answer = app.test_client().post("/v1/chat/completions", json={"messages": "x", "store": True})
        assert (answer.status_code, answer.json["error"]["param"]) == (400, "store")


def test_what_is_unknown_in_a_message_is_not_kept(client, http):
    part = {"type": "text", "text": "x", "unknown": 1}
    call = {"id": "c", "type": "function", "unknown": 1, "function": {"name": "f", "arguments": "{}", "unknown": 1}}
    messages = [
        {"role": "user", "content": [part], "unknown": ["x"] * 9},
        {"role": "assistant", "content": None, "tool_calls": [call], "unknown": 1},
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ]
    made = http.post("/v1/chat/completions", json={"messages": messages, "store": True}).json
    assert len(made["warnings"]) == 5
    asked, called, told = http.get(f"/v1/chat/completions/{made['id']}/messages").json["data"]
    assert (asked["content"], asked["content_parts"]) == ("x", [{"type": "text", "text": "x"}])
    assert called["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert "unknown" not in str([asked, called, told])


def test_a_list_holds_no_more_than_one_request_may_read(runtime, answering):
    """Pages are shorter then, and say that more follow."""
    long = [{"role": "user", "content": "x" * 1_500}]
    with application(runtime, max_body_bytes=2_000) as app:
        http = app.test_client()
        body = {"messages": long, "store": True, "transcript_choices": True}
        made = [http.post("/v1/chat/completions", json=body).json["id"] for _ in range(9)]
        found: list[str] = []
        pages = 0
        more = True
        while more:
            after = f"&after={found[-1]}" if found else ""
            page = http.get(f"/v1/chat/completions?limit=100{after}").json
            assert 1 <= len(page["data"]) <= 4
            found += [each["id"] for each in page["data"]]
            more = page["has_more"]
            pages += 1
    assert found == made
    assert pages >= 3


@pytest.mark.parametrize("way", ["stream", "key"])
def test_what_was_deleted_stays_so_when_its_stream_is_read_again(client, http, answering, way):
    headers = {"Idempotency-Key": "k"} if way == "key" else {}
    body = {"messages": MESSAGES, "store": True, "resumable": True, "stream": way == "stream"}
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    made = re.search(r"chatcmpl-\w+", answer.text)[0]
    url = f"/v1/chat/completions/{made}"
    assert http.get(url).status_code == 200
    assert http.delete(url).status_code == 200
    if way == "stream":
        again = http.get(f"/v1/streams/{made}")
    else:
        again = http.post("/v1/chat/completions", json=body, headers=headers)
    assert again.status_code == 200
    assert made in again.text
    assert http.get(url).status_code == 404
