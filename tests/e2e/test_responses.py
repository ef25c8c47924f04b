"""The Responses API on the real server with two HTTP workers: stored, continued, in the background, through deaths."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
from openai.types.responses import Response

from tests.e2e.server import Server, wait_until

LONG = {"max_output_tokens": 3000, "ignore_eos": True}
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Past:
    """What an earlier server was asked: one response that it finished, one that it was working on."""

    finished: Response
    running_id: str


def start(state: Path) -> Server:
    # A small model has enough to say in 8192 tokens to be interrupted.
    return Server("--http_workers", "2", TAILRACE_STATE_DIR=str(state))


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def past(state: Path) -> Past:
    """A response that was made by a server that is no more, and a background one that it did not finish."""
    server = start(state).wait_ready()
    try:
        client = client_of(server)
        first = client.responses.create(
            model="llama-3-chinese", input="What is the capital of France?", temperature=0, max_output_tokens=30
        )
        assert first.status in ("completed", "incomplete")
        assert first.output_text
        running = client.responses.create(model="llama-3-chinese", input="Count.", background=True, extra_body=LONG)
        assert running.status == "queued"
        for process in server.processes():
            process.kill()
        return Past(first, running.id)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def responses_server(state: Path, past: Past) -> Iterator[Server]:
    server = start(state)
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0


@pytest.fixture(scope="module")
def client(responses_server: Server) -> Iterator[openai.OpenAI]:
    with client_of(responses_server) as client:
        yield client


def test_responses_survive_the_death_of_the_whole_service(client: openai.OpenAI, past: Past):
    found = client.responses.retrieve(past.finished.id)
    assert found.output == past.finished.output
    follow = client.responses.create(
        model="llama-3-chinese", input="Say it again.", previous_response_id=found.id, max_output_tokens=10
    )
    assert follow.usage.input_tokens > found.usage.input_tokens + found.usage.output_tokens - 5
    lost = client.responses.retrieve(past.running_id)
    assert lost.status == "failed"
    assert lost.error.code == "server_error"


def test_a_stream_ends_with_the_response_that_is_stored(client: openai.OpenAI):
    more = {"model": "llama-3-chinese", "input": "Name three colours.", "temperature": 0, "max_output_tokens": 40}
    events = list(client.responses.create(**more, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert final.output_text == text
    assert client.responses.retrieve(final.id) == final
    assert client.responses.create(**more).output_text == text


def test_a_background_response_comes_to_its_end_and_any_http_worker_knows(
    client: openai.OpenAI, responses_server: Server
):
    made = client.responses.create(
        model="llama-3-chinese", input="Name a colour.", background=True, max_output_tokens=20
    )
    assert made.status == "queued"

    def ended() -> bool:
        # Each new connection goes to whichever HTTP worker takes it.
        with client_of(responses_server) as fresh:
            return fresh.responses.retrieve(made.id).status in ("completed", "incomplete")

    wait_until(ended, "the response", PATIENCE_S)
    assert client.responses.retrieve(made.id).output_text


def test_a_background_response_is_cancelled_by_any_http_worker(client: openai.OpenAI, responses_server: Server):
    made = client.responses.create(model="llama-3-chinese", input="Count.", background=True, extra_body=LONG)
    with client_of(responses_server) as fresh:
        assert fresh.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    health = responses_server.http
    wait_until(lambda: health.get("/health").json()["running"] == 0, "the model to stop", PATIENCE_S)


def test_a_response_whose_http_worker_is_killed_fails(client: openai.OpenAI, responses_server: Server, state: Path):
    before = responses_server.http_workers()
    assert len(before) == 2
    made = client.responses.create(
        model="llama-3-chinese", input="Count.", background=True, stream=True, extra_body=LONG
    )
    response_id = next(iter(made)).response.id
    with sqlite3.connect(state / "store.sqlite3") as database:
        (runner,) = database.execute("SELECT runner FROM record WHERE id = ?", (response_id,)).fetchone()
    pid = int(runner.partition("-")[0])
    assert pid in before
    psutil.Process(pid).kill()

    def failed() -> bool:
        try:
            with client_of(responses_server) as fresh:
                return fresh.responses.retrieve(response_id).status == "failed"
        except openai.APIConnectionError:
            return False

    wait_until(failed, "the response to fail", PATIENCE_S)
    with client_of(responses_server) as fresh:
        events = list(fresh.responses.retrieve(response_id, stream=True, starting_after=0))
        assert events[-1].type == "response.failed"
        answer = fresh.responses.create(model="llama-3-chinese", input="Hello", max_output_tokens=5)
        assert answer.output_text is not None
    wait_until(lambda: len(responses_server.http_workers()) == 2, "the HTTP workers", PATIENCE_S)


def test_stored_chat_completions_are_known_to_all(client: openai.OpenAI, responses_server: Server):
    made = client.chat.completions.create(
        model="llama-3-chinese",
        messages=[{"role": "user", "content": "Hello"}],
        store=True,
        max_tokens=5,
        metadata={"purpose": "test"},
    )
    for _ in range(4):
        with client_of(responses_server) as fresh:
            assert fresh.chat.completions.retrieve(made.id).choices == made.choices
            assert [each.id for each in fresh.chat.completions.list(metadata={"purpose": "test"})] == [made.id]
