"""What becomes of a response: read, continued, cancelled, deleted; whose it is; in the background."""

import threading

import openai
import orjson
import pytest

from app.api.responses.reader import EventReader
from app.store.record import Retention
from app.store.store import Store
from tests.app.conftest import application
from tests.app.responses.conftest import REPLY, client_of
from tests.app.responses.test_create import create, events_of, prompt_of, without_ids
from tests.app.scripted_pool import silent
from tests.app.tiny import IM_END, ids_of
from workers.messages import Failed, Output, Started


@pytest.fixture
def held(pool):
    """A pool that says one word and then waits until the test lets it go on."""
    pool.go_on = threading.Event()

    def reply(job):
        yield Started(id=job.id)
        yield Output(id=job.id, choice=0, ids=ids_of("Paris"))
        pool.go_on.wait(60)
        yield Output(id=job.id, choice=0, ids=[*ids_of(" is"), IM_END], finish_reason="stop", stop_token_id=IM_END)

    pool.reply = reply
    yield pool
    pool.go_on.set()


def get(http, response_id: str, suffix: str = ""):
    return http.get(f"/v1/responses/{response_id}{suffix}")


def status(http, response_id: str) -> str:
    return get(http, response_id).json["status"]


# --- stored, continued, deleted


def test_another_http_worker_and_a_restarted_one_have_the_response(http, other, runtime, answering):
    body = create(http).json
    assert get(other.test_client(), body["id"]).json == body
    with application(runtime) as restarted:
        assert get(restarted.test_client(), body["id"]).json == body
        restarted.close()


def test_what_is_not_to_be_stored_is_not(http, answering):
    body = create(http, store=False).json
    assert body["store"] is False
    assert get(http, body["id"]).status_code == 404


def test_a_conversation_is_continued_without_the_old_instructions(http, other, answering):
    first = create(http, input="One?", instructions="Be brief.").json
    second = create(other.test_client(), input="Two?", previous_response_id=first["id"]).json
    assert second["previous_response_id"] == first["id"]
    assert second["instructions"] is None
    create(http, input="Three?", previous_response_id=second["id"], instructions="New.")
    turns = [f"<|im_start|>user\n{question}<|im_end|>\n" for question in ("One?", "Two?", "Three?")]
    said = f"<|im_start|>assistant\n{REPLY}<|im_end|>\n"
    assert prompt_of(answering, 1).endswith(turns[0] + said + turns[1] + "<|im_start|>assistant\n")
    assert "Be brief." not in prompt_of(answering, 1)
    expected = "<|im_start|>system\nNew.<|im_end|>\n" + turns[0] + said + turns[1] + said + turns[2]
    assert prompt_of(answering, 2) == expected + "<|im_start|>assistant\n"


def test_a_deleted_response_is_gone_and_its_conversation_cannot_go_on(http, answering):
    first = create(http).json["id"]
    second = create(http, previous_response_id=first).json["id"]
    gone = http.delete(f"/v1/responses/{first}")
    assert gone.json == {"id": first, "object": "response", "deleted": True}
    assert http.delete(f"/v1/responses/{first}").status_code == 404
    assert get(http, first).status_code == 404
    answer = create(http, previous_response_id=second)
    assert (answer.status_code, answer.json["error"]["param"]) == (404, "previous_response_id")
    assert first in answer.json["error"]["message"]


def test_input_items_are_listed_in_pages(app, http, answering):
    first = create(http, input="One?").json
    items = [{"role": "user", "content": "Two?"}, {"role": "system", "content": [{"type": "input_text", "text": "S"}]}]
    second = create(http, input=items, previous_response_id=first["id"]).json
    client = client_of(app)
    found = list(client.responses.input_items.list(second["id"], order="asc", limit=2))
    assert [(item.role, item.content[0].text) for item in found] == [
        ("user", "One?"), ("assistant", REPLY), ("user", "Two?"), ("system", "S"),
    ]  # fmt: skip
    assert [item.content[0].type for item in found] == ["input_text", "output_text", "input_text", "input_text"]
    assert found[1].id == first["output"][0]["id"]
    assert [item.id for item in client.responses.input_items.list(second["id"])] == [item.id for item in found[::-1]]
    page = get(http, second["id"], f"/input_items?limit=1&after={found[3].id}").json
    assert (page["first_id"], page["last_id"], page["has_more"]) == (found[2].id, found[2].id, True)
    for bad in ("limit=0", "limit=101", "limit=x", "order=up", "after=none", "include=x"):
        answer = get(http, second["id"], f"/input_items?{bad}")
        assert (answer.status_code, answer.json["error"]["param"]) == (
            400,
            bad.split("=")[0].replace("include", "include[0]"),
        )


def test_an_item_can_be_referred_to(http, answering):
    body = create(http, input="One?").json
    message = body["output"][0]["id"]
    asked = get(http, body["id"], "/input_items").json["data"][0]["id"]
    for reference in ({"type": "item_reference", "id": asked}, {"id": asked}):
        items = [reference, {"type": "item_reference", "id": message}, {"role": "user", "content": "Two?"}]
        assert create(http, input=items).status_code == 200
        prompt = prompt_of(answering, len(answering.jobs) - 1)
        assert (
            f"<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n{REPLY}<|im_end|>\n<|im_start|>user\nTwo?"
            in prompt
        )


def test_a_few_bytes_cannot_stand_for_very_many(runtime, answering):
    with application(runtime, max_body_bytes=1024) as app:
        http = app.test_client()
        first = create(http, input="x" * 900).json
        item = get(http, first["id"], "/input_items").json["data"][0]["id"]
        twice = create(http, input=[{"type": "item_reference", "id": item}] * 2)
        assert (twice.status_code, twice.json["error"]["param"]) == (400, "input[1].id")
        last = first["id"]
        for _ in range(4):
            answer = create(http, input="x" * 900, previous_response_id=last)
            last = answer.json.get("id", last)
        assert (answer.status_code, answer.json["error"]["param"]) == (400, "previous_response_id")
        assert "larger than 4096 bytes" in answer.json["error"]["message"]
        app.close()


# --- whose it is


def test_what_is_stored_belongs_to_the_keys_owner(runtime, answering):
    with application(runtime, api_key=["ann=sk-ann-0123456789abcdef", "bob=sk-bob-0123456789abcdef"]) as app:
        http = app.test_client()
        ann, bob = ({"Authorization": f"Bearer sk-{name}-0123456789abcdef"} for name in ("ann", "bob"))
        body = http.post("/v1/responses", json={"input": "x"}, headers=ann).json
        url, item = f"/v1/responses/{body['id']}", body["output"][0]["id"]
        for method, path in (
            ("GET", url), ("GET", f"{url}?stream=true"), ("DELETE", url), ("POST", f"{url}/cancel"),
            ("GET", f"{url}/input_items"),
        ):  # fmt: skip
            assert http.open(path, method=method, headers=bob).status_code == 404, path
        for given in ({"previous_response_id": body["id"]}, {"input": [{"type": "item_reference", "id": item}]}):
            assert http.post("/v1/responses", json={"input": "x", **given}, headers=bob).status_code == 404
        assert http.get(url, headers=ann).json == body
        app.close()


# --- a store that cannot be used


def test_without_a_place_to_store_only_what_must_be_stored_is_refused(runtime, answering):
    (runtime / "file").write_text("")
    with application(runtime, state_dir=runtime / "file" / "state") as app:
        http = app.test_client()
        for body in ({}, {"stream": True}, {"background": True}, {"previous_response_id": "resp_x", "store": False}):
            answer = create(http, **body)
            assert (answer.status_code, answer.json["error"]["code"]) == (503, "store_unavailable")
            assert "Retry-After" in answer.headers
            assert str(runtime) not in answer.text
        assert get(http, "resp_x").status_code == 503
        assert create(http, store=False).json["status"] == "completed"
        chat = http.post("/v1/chat/completions", json={"messages": "x"})
        assert chat.status_code == 200
        answering.wait(lambda: app.extensions["tailrace"].open_requests == 0)


def test_a_disk_that_fills_up_in_the_middle_is_an_error_of_that_response_alone(app, http, held):
    answer = http.post("/v1/responses", json={"input": "x", "stream": True})
    parts = answer.iter_encoded()
    text = next(parts).decode()
    connection = app.extensions["tailrace.store"]._database._connection
    connection.execute("PRAGMA query_only = ON")
    held.go_on.set()
    text += b"".join(parts).decode()
    *_, error, failed = events_of(text)
    assert (error["code"], failed["type"]) == ("store_unavailable", "response.failed")
    assert create(http, store=False).json["status"] == "completed"
    connection.execute("PRAGMA query_only = OFF")
    # It is not taken for a running one for ever.
    held.wait(lambda: status(http, failed["response"]["id"]) == "failed")


def test_a_stream_from_a_store_that_fails_ends_with_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    broken = Store(tmp_path / "file" / "state", Retention(1, 1, 1))
    parts = list(EventReader(broken, "", "resp_x", 7).parts(None, lambda: False))
    broken.close()
    (event,) = parts
    assert event.startswith(b"event: error\n")
    told = orjson.loads(event.split(b"data: ")[1])
    assert (told["sequence_number"], told["code"]) == (8, "store_unavailable")


def test_a_server_that_stores_nothing_says_so(runtime, answering):
    with application(runtime, store_max_items=0) as app:
        http = app.test_client()
        body = create(http).json
        assert (body["status"], body["store"]) == ("completed", False)
        assert create(http, store=True).json["error"]["param"] == "store"
        assert create(http, background=True).json["error"]["param"] == "background"
        assert not (runtime / "state").exists()


def test_only_so_many_are_kept(runtime, answering):
    with application(runtime, store_max_items=2) as app:
        http = app.test_client()
        made = [create(http).json["id"] for _ in range(3)]
        assert [get(http, each).status_code for each in made] == [404, 200, 200]
        app.close()


# --- clients that leave


def test_a_response_whose_client_left_is_kept_as_cancelled(http, held):
    answer = http.post("/v1/responses", json={"input": "x", "stream": True})
    parts = answer.iter_encoded()
    response_id = events_of(next(parts).decode())[0]["response"]["id"]
    assert status(http, response_id) == "in_progress"
    next(parts)
    answer.close()
    held.wait(lambda: status(http, response_id) == "cancelled")
    body = get(http, response_id).json
    assert body["output"][0]["content"][0]["text"] == "Paris"
    assert body["output"][0]["status"] == "incomplete"
    held.wait(lambda: held.is_cancelled(response_id))


# --- in the background


def test_a_background_response_goes_on_without_its_client(app, http, other, held):
    body = create(http, background=True).json
    assert (body["status"], body["background"], body["output"]) == ("queued", True, [])
    other_http = other.test_client()
    held.wait(lambda: status(other_http, body["id"]) == "in_progress")
    assert app.is_busy
    held.go_on.set()
    held.wait(lambda: status(other_http, body["id"]) == "completed")
    done = get(http, body["id"]).json
    assert done["output"][0]["content"][0]["text"] == "Paris is"
    held.wait(lambda: not app.is_busy)
    assert app.extensions["tailrace"].open_requests == 0


def test_a_running_response_cannot_be_continued_yet(http, held):
    running = create(http, background=True).json["id"]
    answer = create(http, previous_response_id=running)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "previous_response_id")


def test_it_is_cancelled_from_another_http_worker(app, http, other, held):
    response_id = create(http, background=True).json["id"]
    cancelled = other.test_client().post(f"/v1/responses/{response_id}/cancel")
    assert (cancelled.status_code, cancelled.json["status"]) == (200, "cancelled")
    held.wait(lambda: held.is_cancelled(response_id))
    held.wait(lambda: not app.is_busy)
    again = other.test_client().post(f"/v1/responses/{response_id}/cancel")
    assert again.json == cancelled.json == get(http, response_id).json


def test_it_is_cancelled_from_the_same_http_worker_at_once(app, http, held):
    response_id = create(http, background=True).json["id"]
    assert http.post(f"/v1/responses/{response_id}/cancel").json["status"] == "cancelled"
    held.wait(lambda: held.is_cancelled(response_id) and not app.is_busy)
    assert status(http, response_id) == "cancelled"


def test_deleting_it_cancels_it(app, http, other, held):
    response_id = create(http, background=True).json["id"]
    assert other.test_client().delete(f"/v1/responses/{response_id}").status_code == 200
    held.wait(lambda: held.is_cancelled(response_id) and not app.is_busy)
    assert get(http, response_id).status_code == 404


def test_only_background_responses_can_be_cancelled(http, answering):
    response_id = create(http).json["id"]
    answer = http.post(f"/v1/responses/{response_id}/cancel")
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "response_id")
    assert http.post("/v1/responses/resp_none/cancel").status_code == 404
    done = create(http, background=True).json["id"]
    answering.wait(lambda: status(http, done) == "completed")
    assert http.post(f"/v1/responses/{done}/cancel").json["status"] == "completed"


def test_a_background_stream_can_be_taken_up_again_anywhere(http, other, held):
    answer = http.post("/v1/responses", json={"input": "x", "stream": True, "background": True})
    parts = answer.iter_encoded()
    first = events_of(next(parts).decode())
    assert [event["type"] for event in first[:2]] == ["response.created", "response.queued"]
    response_id = first[0]["response"]["id"]
    answer.close()
    held.go_on.set()
    whole = get(other.test_client(), response_id, "?stream=true")
    events = events_of(whole.text)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    assert "".join(event.get("delta", "") for event in events) == "Paris is"
    assert events[-1]["response"] == get(http, response_id).json
    for after in (0, 4, len(events) - 2):
        rest = get(http, response_id, f"?stream=true&starting_after={after}").text
        assert rest == whole.text.split("\n\n", after + 1)[-1]
    for after in (len(events) - 1, 10**9):
        assert get(http, response_id, f"?stream=true&starting_after={after}").text == ""


def test_the_stream_of_a_background_response_is_that_of_any_other(http, answering):
    plain = events_of(create(http, stream=True).text)
    events = events_of(create(http, stream=True, background=True).text)
    assert [event["type"] for event in events] == [
        "response.created", "response.queued", *[event["type"] for event in plain[1:]]
    ]  # fmt: skip
    ours, theirs = events[-1]["response"], plain[-1]["response"]
    assert without_ids({**ours, "background": False}) == without_ids(theirs)


def test_the_openai_client_streams_a_background_response_from_the_middle(app, answering):
    client = client_of(app)
    stream = client.responses.create(model="tiny", input="x", background=True, stream=True)
    events = list(stream)
    response_id = events[0].response.id
    again = list(client.responses.retrieve(response_id, stream=True, starting_after=5))
    assert [event.sequence_number for event in again] == [event.sequence_number for event in events[6:]]
    assert again[-1].response.output_text == REPLY
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_none")
    assert client.responses.delete(response_id) is None


def test_only_what_was_streamed_in_the_background_can_be_streamed_again(http, answering):
    plain = create(http).json["id"]
    quiet = create(http, background=True).json["id"]
    answering.wait(lambda: status(http, quiet) == "completed")
    for response_id in (plain, quiet):
        answer = get(http, response_id, "?stream=true")
        assert (answer.status_code, answer.json["error"]["param"]) == (400, "stream")
    for bad in ("stream=maybe", "starting_after=1", "stream=true&starting_after=-1", "include[]=x"):
        answer = get(http, plain, f"?{bad}")
        assert answer.status_code == 400, bad


def test_a_cancelled_stream_ends(http, other, held):
    answer = http.post("/v1/responses", json={"input": "x", "stream": True, "background": True})
    parts = answer.iter_encoded()
    response_id = events_of(next(parts).decode())[0]["response"]["id"]
    other.test_client().post(f"/v1/responses/{response_id}/cancel")
    text = b"".join(parts).decode()
    last = text.rstrip().rsplit("\n\n", 1)[-1]
    assert last.startswith("event: response.failed\n")
    assert '"status":"cancelled"' in last
    again = get(other.test_client(), response_id, "?stream=true").text
    assert again.endswith(last + "\n\n")


def test_a_stopping_server_lets_it_fail_with_a_reason(app, http, other, held):
    response_id = create(http, background=True).json["id"]
    held.wait(lambda: status(http, response_id) == "in_progress")
    app.end_streams()
    held.wait(lambda: not app.is_busy)
    body = get(other.test_client(), response_id).json
    assert body["status"] == "failed"
    assert "shutting down" in body["error"]["message"]
    assert create(http, background=True).status_code == 503


def test_a_fault_of_the_pool_fails_it(app, http, pool):
    pool.reply = silent
    response_id = create(http, background=True).json["id"]
    pool.send(Started(id=response_id))
    pool.send(Failed(id=response_id, kind="internal", message="it broke"))
    pool.wait(lambda: status(http, response_id) == "failed")
    assert get(http, response_id).json["error"] == {"code": "server_error", "message": "it broke"}
    pool.wait(lambda: not app.is_busy)


def test_one_that_waits_for_its_turn_is_queued(http, pool):
    pool.reply = silent
    response_id = create(http, background=True).json["id"]
    assert status(http, response_id) == "queued"
    pool.send(Started(id=response_id), Output(id=response_id, choice=0, ids=[5]))
    pool.wait(lambda: status(http, response_id) == "in_progress")
    pool.send(Output(id=response_id, choice=0, finish_reason="length"))
    pool.wait(lambda: status(http, response_id) == "incomplete")
