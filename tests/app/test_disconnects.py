"""A client that leaves, or stops reading, costs nothing any more: in every phase, streaming or not."""

import time
from typing import Any

import httpx
import pytest

from tests.app.conftest import Server
from tests.app.raw_http import RawClient
from tests.app.scripted_pool import eventually, tokens
from tests.app.tiny import IM_END, ids_of
from workers.messages import Output, Started

CHAT = "/v1/chat/completions"
# Far more than it takes on a slow and busy machine, far less than any request's own time.
SOON_S = 30.0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
@pytest.mark.parametrize("reset", [False, True])
def test_leaving_cancels_soon(server: Server, stream: bool, phase: str, reset: bool) -> None:
    client = RawClient(server.port).post(CHAT, {"messages": "Hello", "stream": stream, "n": 2})
    job = server.pool.next_job()
    if phase != "queued":
        server.pool.send(Started(id=job.id))
    if phase == "decode":
        server.pool.send(Output(id=job.id, ids=ids_of("Hi")))
    if stream:
        client.read_until(b'"content":"Hi"' if phase == "decode" else b'"role":"assistant"')
    assert server.pool.cancels == []

    client.leave(reset)

    server.pool.wait(lambda: server.pool.is_cancelled(job.id), SOON_S)
    eventually(lambda: server.stats()["open_requests"] == 0)


@pytest.mark.parametrize(
    ("path", "body", "jobs"),
    [("/v1/completions", {"prompt": ["a", "b", "c"]}, 3), ("/v1/embeddings", {"input": ["a", "b", "c"]}, 3)],
)
def test_leaving_cancels_every_job_of_a_request(server: Server, path: str, body: dict[str, Any], jobs: int) -> None:
    client = RawClient(server.port).post(path, body)
    server.pool.next_job(jobs)
    client.leave()
    server.pool.wait(lambda: all(server.pool.is_cancelled(job.id) for job in server.pool.jobs), SOON_S)


def test_a_finished_request_is_not_cancelled(server: Server) -> None:
    server.pool.reply = tokens(ids_of("ok"), stop=IM_END)
    for stream in (True, False):
        body = {"messages": "Hello", "stream": stream}
        assert httpx.post(server.url + CHAT, json=body, timeout=60).status_code == 200
    assert httpx.get(server.url + "/readyz", timeout=60).status_code == 200
    assert server.pool.cancels == []


def test_a_client_that_does_not_read_is_dropped_and_disturbs_nobody(server: Server) -> None:
    logged = len(server.log.read_text())
    stalled = RawClient(server.port, receive_buffer=4096).post(CHAT, {"messages": "Hello", "stream": True})
    job = server.pool.next_job()
    text = ids_of("今天天气真不错 " * 400)
    begun = time.monotonic()
    while not server.pool.is_cancelled(job.id):
        server.pool.send(Output(id=job.id, ids=text))
        assert httpx.get(server.url + "/livez", timeout=10).status_code == 200
        assert time.monotonic() - begun < 60
    # A write that waits for the client would hold up everybody for the send timeout, 2 s.
    assert server.stats()["hub_lag_s"] < 0.5
    eventually(lambda: server.stats()["open_requests"] == 0)
    stalled.leave()
    assert "Traceback" not in server.log.read_text()[logged:]


def test_tokens_that_nobody_takes_are_bounded(server: Server) -> None:
    stalled = RawClient(server.port, receive_buffer=4096).post(CHAT, {"messages": "Hello", "stream": True})
    job = server.pool.next_job()
    for _ in range(40):
        # Half a megabyte at a time, far faster than the send timeout.
        server.pool.send(*[Output(id=job.id, ids=ids_of("今天天气真不错 " * 5))] * 1000)
        if server.pool.is_cancelled(job.id):
            break
    server.pool.wait(lambda: server.pool.is_cancelled(job.id))
    stalled.leave()
