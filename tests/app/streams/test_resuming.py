"""Streams that are read again: the same events with the same ids, from any of them on, by any HTTP worker."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.sse import KEEP_ALIVE
from app.pool_stream import Stream
from tests.app.clock import Clock
from tests.app.conftest import application, runtime_directory
from tests.app.scripted_pool import ScriptedPool, eventually
from tests.app.streams.asking import CHAT, COMPLETIONS, KINDS, MESSAGES, ask, events_of, script, stream_id
from tests.app.tiny import ids_of, write_card
from tests.app.tool_models import TEMPLATES
from tests.sse import numbered_events
from workers.messages import Event, Failed, GenerateJob, Output, Started


@contextlib.contextmanager
def two_workers(**options: Any) -> Iterator[tuple[FlaskClient, FlaskClient, ScriptedPool]]:
    """Two applications at one pool, as two HTTP workers are."""
    with runtime_directory() as folder:
        card = write_card(folder, chat_template=TEMPLATES["hermes"])
        pool = ScriptedPool(folder / "pool.sock", card, **options).start()
        try:
            with application(folder) as one, application(folder) as other:
                yield one.test_client(), other.test_client(), pool
        finally:
            pool.stop()


@pytest.fixture
def workers() -> Iterator[tuple[FlaskClient, FlaskClient, ScriptedPool]]:
    with two_workers() as made:
        yield made


Workers = tuple[FlaskClient, FlaskClient, ScriptedPool]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_stream_begins_behind_any_of_its_events(workers: Workers, kind: str) -> None:
    one, other, pool = workers
    route, _, said = KINDS[kind]
    pool.reply = lambda job: script(job, said)
    first = ask(one, kind)
    assert first.status_code == 200, first.text
    whole = events_of(first.text)
    name = stream_id(first.text)
    assert first.headers["X-Tailrace-Stream"] == name
    assert events_of(other.get(f"/v1/streams/{name}").text) == whole
    for seen in (1, 2, len(whole) // 2, len(whole) - 1, len(whole)):
        again = other.get(f"/v1/streams/{name}", headers={"Last-Event-ID": f"{name}:{seen}"})
        assert again.status_code == 200
        assert again.content_type == first.content_type
        assert again.text.startswith(":")
        assert events_of(again.text) == whole[seen:]
        assert again.text.endswith(whole[-1] + "\n\n") or seen == len(whole)
        repeated = other.post(route, json={}, headers={"Last-Event-ID": f"{name}:{seen}"})
        assert events_of(repeated.text) == whole[seen:]
        counted = other.get(f"/v1/streams/{name}?starting_after={seen}")
        assert events_of(counted.text) == whole[seen:]


class Cut:
    """`Stream.get` that gives what came in turns of the sizes asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._get = Stream.get

    def __call__(self, stream: Stream, timeout: float | None = None) -> list[Event]:
        events = self._get(stream, timeout)
        size = self.sizes.pop(0) if self.sizes else len(events)
        stream.unget(events[size:])
        return events[:size]


@pytest.mark.parametrize("kind", KINDS)
def test_the_events_do_not_depend_on_how_many_tokens_come_at_a_time(
    workers: Workers, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, pool = workers
    pool.reply = lambda job: script(job, KINDS[kind][2])
    first = ask(one, kind).text
    name = stream_id(first)
    cut = Cut()
    monkeypatch.setattr(Stream, "get", lambda stream, timeout=None: cut(stream, timeout))

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.integers(1, 9), max_size=40))
    def check(sizes: list[int]) -> None:
        cut.sizes = [1, *sizes]
        assert events_of(other.get(f"/v1/streams/{name}").text) == events_of(first)

    check()


@pytest.mark.parametrize("kind", ["chat", "completion", "messages"])
def test_what_was_not_streamed_can_be_read_as_a_stream(workers: Workers, kind: str) -> None:
    one, other, pool = workers
    route, body, said = KINDS[kind]
    pool.reply = lambda job: script(job, said)
    answer = one.post(route, json={**body, "resumable": True})
    name = answer.get_json()["id"]
    assert answer.headers["X-Tailrace-Stream"] == name
    stream = other.get(f"/v1/streams/{name}").text
    assert stream_id(stream) == name
    assert numbered_events(stream)


def running(one: FlaskClient, pool: ScriptedPool, kind: str = "chat") -> tuple[Iterator[bytes], GenerateJob]:
    """A stream on its way: its parts, and its job."""
    response = ask(one, kind)
    job = pool.next_job()
    assert isinstance(job, GenerateJob)
    parts = response.iter_encoded()
    return parts, job


def read(parts: Iterator[bytes], what: str) -> str:
    seen = ""
    while what not in seen:
        seen += next(parts).decode()
    return seen


def test_a_reader_who_comes_back_gets_what_came_meanwhile_and_what_comes(workers: Workers) -> None:
    one, other, pool = workers
    response = ask(one, "chat")
    parts = response.iter_encoded()
    job = pool.next_job()
    tokens = ids_of("One two three four five")
    pool.send(Started(id=job.id), Output(id=job.id, ids=tokens[:2]))
    seen = read(parts, "content")
    seen += next(parts).decode() if '"content":"O' not in seen else ""
    response.close()
    pool.send(Output(id=job.id, ids=tokens[2:4]))
    count = len(events_of(seen))
    name = stream_id(seen)
    again = other.post(CHAT, json={}, headers={"Last-Event-ID": f"{name}:{count}"})
    parts = again.iter_encoded()
    seen += read(parts, '"content"')
    pool.send(Output(id=job.id, ids=tokens[4:]))
    pool.send(Output(id=job.id, finish_reason="length"))
    seen += b"".join(parts).decode()
    assert numbered_events(seen)[-1][2] == "[DONE]"
    assert events_of(one.get(f"/v1/streams/{name}").text) == events_of(seen)
    assert not pool.is_cancelled(job.id)


def test_an_http_worker_that_was_not_there_goes_on_with_what_another_began(runtime: Path, pool: ScriptedPool) -> None:
    with application(runtime) as app:
        parts, job = running(app.test_client(), pool)
        seen = read(parts, "role")
        assert len(pool._connections) == 1
    # Its connection to the pool is closed now, as when it was killed.
    eventually(lambda: pool.rooms._rooms[job.id].lonely_since is not None)
    pool.send(*script(job, "Hello, world!"))
    with application(runtime) as app:
        again = app.test_client().post(CHAT, json={}, headers={"Last-Event-ID": f"{job.id}:1"})
        seen += again.text
    assert numbered_events(seen)[-1][2] == "[DONE]"


def test_who_has_seen_all_there_is_hears_that_the_stream_lives(runtime: Path, pool: ScriptedPool) -> None:
    with application(runtime, keepalive_comment_s=0.05) as app:
        parts, job = running(app.test_client(), pool)
        read(parts, "role")
        again = app.test_client().get(f"/v1/streams/{job.id}?starting_after=1").iter_encoded()
        heard = [next(again) for _ in range(4)]
        assert set(heard) == {KEEP_ALIVE}


def test_many_who_do_not_read_a_long_answer_do_not_take_all_memory(
    runtime: Path, pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.pool_stream.LOOK_EVENTS", 16)
    monkeypatch.setattr("app.pool_stream.MAX_PENDING_OF_ALL", 1000)
    pool.reply = lambda job: script(job, "Hello, world! " * 20)
    with application(runtime) as app:
        client, line = app.test_client(), app.extensions["tailrace"].pool
        name = client.post(CHAT, json={"messages": "Hello", "resumable": True}).get_json()["id"]
        whole = events_of(client.get(f"/v1/streams/{name}").text)
        readers = [client.get(f"/v1/streams/{name}", buffered=False) for _ in range(8)]
        eventually(lambda: line.pending_events() > 500)
        assert line.pending_events() < 1100
        ends = [events_of(reader.text)[-1] for reader in readers]
        assert any("too slowly" in end for end in ends)
        assert events_of(client.get(f"/v1/streams/{name}").text) == whole


def test_who_finds_that_a_request_has_just_ended_begins_it_anew(runtime: Path, pool: ScriptedPool) -> None:
    pool.reply = lambda job: script(job, "Hello")
    attach, lost = pool.rooms.attach, []

    def late(line: Any, message: Any) -> None:
        # Between the answer to Keep and this the window has come to its end.
        lost.append(message.request)
        pool.rooms._forget(pool.rooms._rooms[message.request])
        attach(line, message)

    pool.rooms.attach = late  # type: ignore[method-assign]
    with application(runtime) as app:
        client = app.test_client()
        ids = [
            client.post(CHAT, json={"messages": "Hello"}, headers={"Idempotency-Key": "x"}).get_json()["id"]
            for _ in range(2)
        ]
        assert lost == ids[:1]
        assert ids[0] != ids[1]
        assert app.extensions["tailrace"].meter.snapshot()["request_success", "length"] == 2


def test_a_reader_who_leaves_ends_what_is_not_kept(workers: Workers) -> None:
    one, _, pool = workers
    response = one.post(CHAT, json={"messages": "Hello", "stream": True})
    job = pool.next_job()
    next(response.iter_encoded())
    response.close()
    pool.wait(lambda: pool.is_cancelled(job.id))


def test_two_readers_at_a_time_both_get_everything(workers: Workers) -> None:
    one, other, pool = workers
    first = ask(one, "n").iter_encoded()
    job = pool.next_job()
    name = job.id
    second = other.get(f"/v1/streams/{name}").iter_encoded()
    begun = next(second)
    pool.send(*script(job, "Hello, world!"))
    told = b"".join(first).decode()
    assert events_of((begun + b"".join(second)).decode()) == events_of(told)
    assert numbered_events(told)


def test_a_stop_string_ends_the_request_for_all(workers: Workers) -> None:
    one, other, pool = workers
    said = script(GenerateJob(id="x", prompt=[1], max_tokens=9), "Hello, world! How are you?")
    body = {"messages": "Hello", "stream": True, "resumable": True, "stop": "world"}
    response = one.post(CHAT, json=body)
    job = pool.next_job()
    parts = response.iter_encoded()
    second = other.get(f"/v1/streams/{job.id}")
    pool.send(*[event for each in said[:-1] for event in [_of(each, job.id)]])
    told = b"".join(parts).decode()
    assert '"finish_reason":"stop"' in told
    pool.wait(lambda: pool.cancels)
    assert events_of(second.text) == events_of(told)
    assert events_of(one.get(f"/v1/streams/{job.id}").text) == events_of(told)


def test_a_failure_behind_the_end_is_none_for_those_who_read_again(workers: Workers) -> None:
    one, other, pool = workers
    response = one.post(CHAT, json={"messages": "Hello", "stream": True, "resumable": True, "stop": "lo"})
    job = pool.next_job()
    room = pool.rooms._rooms[job.id]
    # The worker dies before it hears that nobody wants more.
    said = [Output(id=job.id, ids=ids_of("Hello")), Failed(id=job.id, kind="internal", message="no")]
    for event in said:
        room.post(event)
    with pool._lock:
        pool._flush()
    told = response.text
    assert '"finish_reason":"stop"' in told
    assert "[DONE]" in told
    assert events_of(other.get(f"/v1/streams/{job.id}").text) == events_of(told)


def _of(event: Event, job_id: str) -> Event:
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    return type(event)(**{**fields, "id": job_id})


@pytest.mark.parametrize("kind", ["chat", "completion", "messages"])
def test_a_failure_ends_the_resumed_stream_as_it_ended_the_first(workers: Workers, kind: str) -> None:
    one, other, pool = workers
    response = ask(one, kind)
    job = pool.next_job()
    pool.send(Started(id=job.id), Output(id=job.id, ids=ids_of("Hello")))
    pool.send(Failed(id=job.id, kind="internal", message="The model worker failed."))
    told = events_of(response.text)
    assert "The model worker failed." in told[-1]
    # An error is no event of the answer.
    assert not told[-1].startswith("id:")
    again = other.get(f"/v1/streams/{job.id}", headers={"Last-Event-ID": f"{job.id}:{len(told) - 1}"})
    error = events_of(again.text)
    if kind == "messages":
        # It names the HTTP request that it answers.
        assert "The model worker failed." in error[0]
    else:
        assert error == told[-1:]


def test_a_refusal_before_the_stream_is_still_a_real_status(workers: Workers) -> None:
    one, other, pool = workers
    pool.reply = lambda job: [Failed(id=job.id, kind="overloaded", message="full", retry_after=3)]
    answer = ask(one, "chat")
    assert answer.status_code == 429
    pool.tend()
    assert other.get(f"/v1/streams/{pool.jobs[0].id}").status_code == 404


def missing(answer: Any) -> bool:
    error = answer.get_json()["error"]
    return answer.status_code == 404 and error["code"] == "stream_not_found"


def test_what_is_not_there_is_404_in_openais_shape(workers: Workers) -> None:
    one, _, pool = workers
    pool.reply = lambda job: script(job, "Hello")
    unkept = one.post(CHAT, json={"messages": "Hello"}).get_json()["id"]
    assert missing(one.get(f"/v1/streams/{unkept}"))
    assert missing(one.get("/v1/streams/nonsense%0a"))
    name = stream_id(ask(one, "chat").text)
    assert missing(one.post(COMPLETIONS, json={}, headers={"Last-Event-ID": f"{name}:1"}))
    anthropic = one.post(MESSAGES, json={}, headers={"Last-Event-ID": f"{name}:1"})
    assert anthropic.status_code == 404
    assert anthropic.get_json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("given", ["x", ":1", "a:b", "a:-1", "a:1:", "a:" + "9" * 16, "a b:1"])
def test_a_last_event_that_is_no_events_id_is_400(workers: Workers, given: str) -> None:
    answer = workers[0].post(CHAT, json={"messages": "Hello"}, headers={"Last-Event-ID": given})
    assert answer.status_code == 400
    assert answer.get_json()["error"]["param"] == "Last-Event-ID"


@pytest.mark.parametrize("given", ["x", "-1", "1.0", "9" * 16])
def test_a_number_that_is_none_is_400(workers: Workers, given: str) -> None:
    answer = workers[0].get(f"/v1/streams/x?starting_after={given}")
    assert answer.status_code == 400
    assert answer.get_json()["error"]["param"] == "starting_after"


def test_another_streams_event_is_400(workers: Workers) -> None:
    answer = workers[0].get("/v1/streams/x", headers={"Last-Event-ID": "y:1"})
    assert answer.status_code == 400


def test_when_the_window_is_over_it_is_gone() -> None:
    clock = Clock()
    with two_workers(window_s=60.0, clock=clock) as (one, other, pool):
        pool.reply = lambda job: script(job, "Hello")
        name = stream_id(ask(one, "chat").text)
        pool.tend()
        clock.now += 59
        pool.tend()
        assert other.get(f"/v1/streams/{name}").status_code == 200
        clock.now += 2
        pool.tend()
        assert missing(other.get(f"/v1/streams/{name}"))


def test_nobody_comes_back_and_the_jobs_are_cancelled() -> None:
    clock = Clock()
    with two_workers(window_s=60.0, clock=clock) as (one, _, pool):
        response = ask(one, "chat")
        job = pool.next_job()
        next(response.iter_encoded())
        response.close()
        eventually(lambda: pool.rooms._rooms[job.id].lonely_since is not None)
        clock.now += 59
        pool.tend()
        assert not pool.is_cancelled(job.id)
        clock.now += 2
        pool.tend()
        assert pool.is_cancelled(job.id)


def test_a_server_that_keeps_nothing_says_so(runtime: Path, pool: ScriptedPool) -> None:
    pool.reply = lambda job: script(job, "Hello")
    with application(runtime, resume_window_s=0) as app:
        client = app.test_client()
        asked = client.post(CHAT, json={"messages": "Hello", "resumable": True})
        assert asked.status_code == 400
        assert asked.get_json()["error"]["param"] == "resumable"
        keyed = client.post(CHAT, json={"messages": "Hello"}, headers={"Idempotency-Key": "k"})
        assert keyed.status_code == 200
        assert "Idempotency-Key" in keyed.get_json()["warnings"][0]


def test_without_room_the_request_is_answered_and_the_client_told() -> None:
    with two_workers(window_s=0.0) as (one, _, pool):
        pool.reply = lambda job: script(job, "Hello")
        answer = one.post(CHAT, json={"messages": "Hello", "resumable": True})
        assert answer.get_json()["choices"][0]["message"]["content"] == "Hello"
        assert "no room" in answer.headers["X-Tailrace-Warnings"]
        assert "X-Tailrace-Stream" not in answer.headers


def test_the_pools_death_is_the_end_of_what_it_kept(workers: Workers) -> None:
    one, other, pool = workers
    response = ask(one, "chat")
    job = pool.next_job()
    pool.send(Output(id=job.id, ids=ids_of("Hello")))
    parts = response.iter_encoded()
    read(parts, "content")
    pool.stop()
    assert "service_unavailable_error" in b"".join(parts).decode()
    pool.start()
    eventually(lambda: other.get("/readyz").status_code == 200)
    assert missing(other.get(f"/v1/streams/{job.id}"))


def test_a_stored_completion_is_stored_once_whoever_reads_its_end(workers: Workers) -> None:
    one, other, pool = workers
    body = {"messages": "Hello", "stream": True, "store": True, "resumable": True}
    response = one.post(CHAT, json=body)
    job = pool.next_job()
    next(response.iter_encoded())
    response.close()
    pool.send(*script(job, "Hello"))
    assert one.get(f"{CHAT}/{job.id}").status_code == 404
    assert "[DONE]" in other.get(f"/v1/streams/{job.id}").text
    assert "[DONE]" in one.get(f"/v1/streams/{job.id}").text
    stored = one.get(CHAT).get_json()["data"]
    assert [each["id"] for each in stored] == [job.id]
    assert stored[0]["choices"][0]["message"]["content"] == "Hello"


def test_a_request_whose_time_is_over_while_nobody_reads_it_ends_and_says_so_to_who_comes_back() -> None:
    clock = Clock()
    with two_workers(window_s=60.0, clock=clock) as (one, other, pool):
        response = ask(one, "chat", **{"X-Request-Timeout": "20"})
        parts = response.iter_encoded()
        job = pool.next_job()
        pool.send(Started(id=job.id), Output(id=job.id, ids=ids_of("One two")))
        name = stream_id(read(parts, "content"))
        response.close()
        eventually(lambda: pool.rooms._rooms[job.id].lonely_since is not None)
        clock.now += 21
        pool.tend()
        again = numbered_events(other.get(f"/v1/streams/{name}").text)
        text = "".join(str(each) for each in again)
        assert again[-1][2] == "[DONE]"
        assert "'length'" in text or '"length"' in text
        assert "after 20 seconds" in text


def test_a_deadline_is_told_in_the_same_words_when_it_is_read_again(workers: Workers) -> None:
    one, other, pool = workers
    response = ask(one, "n", **{"X-Request-Timeout": "0.3"})
    job = pool.next_job()
    pool.send(Started(id=job.id), *(Output(id=job.id, choice=choice, ids=ids_of("One")) for choice in range(3)))
    first = response.text
    assert "after 0.3 seconds" in first
    assert events_of(other.get(f"/v1/streams/{stream_id(first)}").text) == events_of(first)
