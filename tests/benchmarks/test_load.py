"""The load generator: how many requests, how many at once, when, and what becomes of those that fail."""

import json
import random
import socket
import threading
import time
from itertools import pairwise

import pytest

from benchmarks.answers import read_answer
from benchmarks.load import Generator, Stream, closed_loop, open_loop, post
from tests.benchmarks.sse_server import HEAD, ScriptedServer, chunk, event, scripted, words

LIMIT_S = 20.0


def request(server: ScriptedServer, max_tokens: int = 3, number: int = 0) -> bytes:
    body = json.dumps({"max_tokens": max_tokens, "number": number}).encode()
    return post(server.address, "/v1/chat/completions", body)


def run(generator: Generator) -> bool:
    return generator.run(time.perf_counter() + LIMIT_S)


def test_an_answer_comes_back_whole():
    with scripted() as server, Generator(server.address) as generator:
        stream = generator.send(request(server))
        assert run(generator)
    answer = read_answer(stream)
    assert (answer.text, answer.finish_reason, answer.error) == (" word0 word1 word2", "length", None)
    assert 0 < answer.first_text_s < LIMIT_S


def test_a_closed_loop_sends_every_request_and_keeps_its_clients_at_work():
    # The first four wait for each other: were fewer open at once, none would be answered.
    together = threading.Barrier(4)

    def in_fours(body):
        if body["number"] < 4:
            together.wait(LIMIT_S)
        yield from words(body)

    with scripted(in_fours) as server, Generator(server.address) as generator:
        streams = closed_loop(generator, [request(server, number=number) for number in range(10)], clients=4)
        assert run(generator)
    assert len(streams) == len(server.bodies) == 10
    assert server.most == 4
    assert all(read_answer(stream).error is None for stream in streams)


def test_more_clients_than_requests_are_no_trouble():
    with scripted() as server, Generator(server.address) as generator:
        streams = closed_loop(generator, [request(server)], clients=3)
        assert run(generator)
    assert len(streams) == 1


@pytest.mark.parametrize("seed", [None, 7])
def test_an_open_loop_sends_when_it_is_due_and_not_when_answers_come(seed):
    all_here = threading.Barrier(6)

    def after_the_last(body):
        all_here.wait(LIMIT_S)
        yield from words(body)

    with scripted(after_the_last) as server, Generator(server.address) as generator:
        streams = open_loop(generator, [request(server)] * 6, 200.0, seed)
        assert run(generator)
    assert server.most == 6
    draw = random.Random(seed)
    pauses = [1 / 200 if seed is None else draw.expovariate(200.0) for _ in range(6)]
    due = [after.sent_at - before.sent_at for before, after in pairwise(streams)]
    assert due == pytest.approx(pauses[1:])


def test_a_long_request_arrives_whole():
    with scripted() as server, Generator(server.address) as generator:
        body = json.dumps({"max_tokens": 1, "text": "x" * 5_000_000}).encode()
        stream = generator.send(post(server.address, "/", body))
        assert run(generator)
        assert read_answer(stream).error is None
    assert len(server.bodies[0]["text"]) == 5_000_000


def test_the_deadline_ends_a_run_and_what_came_until_then_is_kept():
    def silent_after_one(_body):
        yield HEAD + chunk(event(" one"))
        threading.Event().wait(LIMIT_S)

    with scripted(silent_after_one) as server, Generator(server.address) as generator:
        stream = generator.send(request(server))
        generator.run(time.perf_counter() + LIMIT_S, lambda: bool(stream.pieces))
        assert not generator.run(time.perf_counter() + 0.01)
    answer = read_answer(stream)
    assert (answer.text, answer.error) == (" one", "not ended")


def test_enough_is_enough():
    with scripted() as server, Generator(server.address) as generator:
        streams = closed_loop(generator, (request(server) for _ in range(10_000)), clients=1)
        assert generator.run(time.perf_counter() + LIMIT_S, lambda: len(streams) >= 5)
    assert len(streams) == 5


def test_a_refused_connection_is_an_error_of_its_answer_and_the_loop_goes_on():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()[:2]
    with Generator(address) as generator:
        streams = closed_loop(generator, [post(address, "/", b"{}")] * 3, clients=1)
        assert run(generator)
    assert len(streams) == 3
    assert all("refused" in (read_answer(stream).error or "") for stream in streams)


def test_a_status_other_than_200_is_an_error_with_the_servers_words():
    def busy(_body):
        yield b'HTTP/1.1 429 Too Many\r\nContent-Length: 12\r\n\r\n{"so":"busy"}'[:-1]

    with scripted(busy) as server, Generator(server.address) as generator:
        stream = generator.send(request(server))
        assert run(generator)
    assert read_answer(stream).error.startswith('status 429: {"so":"busy"')


def test_an_answer_that_breaks_off_is_an_error():
    def breaks(_body):
        yield HEAD + chunk(event(" half"))

    with scripted(breaks) as server, Generator(server.address) as generator:
        stream = generator.send(request(server))
        assert run(generator)
    assert read_answer(stream).error == "cut off"


def test_no_answer_at_all_is_an_error():
    assert read_answer(Stream(0.0, ended_at=1.0)).error == "no answer"
