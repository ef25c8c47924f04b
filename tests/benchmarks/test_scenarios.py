"""Each kind of load against a scripted server: what is sent, and which figures come of it."""

import threading
from dataclasses import replace

import pytest

from benchmarks.prompts import long_prefix, question, short_prompts
from benchmarks.scenarios import (
    QUICK,
    Sizes,
    Target,
    cold_and_repeated_prompts,
    disturbed_streams,
    fixed_rate,
    throughput,
)
from tests.benchmarks.sse_server import END, HEAD, ScriptedServer, chunk, event, scripted, words

SIZES = replace(QUICK, output_tokens=5, requests_per_s=500.0, alone_s=0.05, long_prompt_tokens=40)


class Words:
    """Counts words as the tokens they are here; token 7 shows no text."""

    def __call__(self, text: str) -> int:
        return len(text.split())

    def without_text(self) -> list[int]:
        return [7]


count = Words()


def target(server: ScriptedServer) -> Target:
    return Target(server.address, "some-model", {"ignore_eos": True}, count, seed=1)


def test_throughput_sends_two_requests_for_each_client_and_counts_the_text_that_came():
    with scripted() as server:
        load = throughput(target(server), 3, SIZES)
    assert (load.clients, load.requests, load.tokens, load.failed, load.short, load.cut) == (3, 6, 30, 0, 0, False)
    assert len(server.bodies) == 6
    assert load.tokens_per_s == pytest.approx(30 / load.seconds)
    assert load.first_token.count == 6
    assert load.gaps.count == 6 * 4


def test_one_client_is_measured_by_more_than_two_requests():
    with scripted() as server:
        assert throughput(target(server), 1, SIZES).requests == 4


def test_each_request_asks_for_the_same_number_of_tokens_of_another_prompt():
    with scripted() as server:
        throughput(target(server), 4, SIZES)
    assert {body["max_tokens"] for body in server.bodies} == {5}
    assert {(body["temperature"], body["stream"], body["ignore_eos"], body["model"]) for body in server.bodies} == {
        (0, True, True, "some-model")
    }
    prompts = {body["messages"][0]["content"] for body in server.bodies}
    assert len(prompts) == 8
    assert len({" ".join(prompt.split()[:6]) for prompt in prompts}) == 8


def test_answers_that_ended_early_are_counted_as_such():
    with scripted(lambda body: words(body | {"max_tokens": 2})) as server:
        load = throughput(target(server), 1, SIZES)
    assert (load.tokens, load.short) == (8, 4)


def test_failed_requests_do_not_count_as_tokens():
    def every_second_fails(body):
        yield from words(body) if len(server.bodies) % 2 else [b"HTTP/1.1 500 Oh\r\n\r\nno"]

    with scripted(every_second_fails) as server:
        load = throughput(target(server), 1, SIZES)
    assert (load.requests, load.failed, load.tokens) == (4, 2, 10)
    assert load.error == "status 500: no"


def test_the_time_limit_cuts_a_load_and_what_came_until_then_counts():
    def endless(_body):
        yield HEAD + chunk(event(" one two"))
        threading.Event().wait(20)

    with scripted(endless) as server:
        load = throughput(target(server), 1, replace(SIZES, load_limit_s=0.2))
    assert (load.cut, load.tokens, load.failed) == (True, 2, 0)


def test_a_fixed_rate_sends_all_its_requests():
    with scripted() as server:
        load = fixed_rate(target(server), SIZES)
    assert (load.clients, load.requests, load.tokens) == (0, 4, 20)


def test_long_prompts_are_new_first_and_then_come_again_with_another_question():
    with scripted() as server:
        prompts = cold_and_repeated_prompts(target(server), replace(SIZES, long_prompts=2))
    assert (len(prompts.cold_s), len(prompts.again_s), prompts.error) == (2, 2, None)
    first, second, first_again, second_again = (body["messages"][0]["content"] for body in server.bodies)
    assert first[:100] == first_again[:100] != second[:100] == second_again[:100]
    assert first != first_again


def test_a_server_that_refuses_long_prompts_says_why():
    with scripted(lambda _body: iter([b"HTTP/1.1 400 No\r\n\r\ntoo long"])) as server:
        prompts = cold_and_repeated_prompts(target(server), SIZES)
    assert prompts.error == "status 400: too long"


def test_the_gap_that_a_long_prompt_makes_is_found():
    over = threading.Event()
    stalled = threading.Event()

    def stalls_for_long_prompts(body):
        if body["max_tokens"] == 8:
            # Until all four streams stand still, then a little longer.
            stalled.wait(20)
            over.wait(0.3)
            over.set()
            yield from words(body)
            return
        yield HEAD
        for number in range(10_000):
            if sum(each["max_tokens"] == 8 for each in server.bodies) and not over.is_set():
                stalled.set()
                over.wait(20)
            yield chunk(event(f" {number}"))
            if over.wait(0.002):
                break
        yield chunk(event(None, "length")) + END

    with scripted(stalls_for_long_prompts) as server:
        gaps = disturbed_streams(target(server), replace(SIZES, disturbing_prompts=1))
    assert (gaps.streams, gaps.prompts, gaps.error) == (4, 1, None)
    assert all((each["max_tokens"] == 512) == (each.get("logit_bias") == {"7": -100}) for each in server.bodies)
    assert gaps.with_prompts.longest > 0.25 > gaps.alone.p50 > 0


def test_long_prefixes_have_the_length_asked_for_and_differ_from_the_start():
    prefixes = [long_prefix(count, 100, seed) for seed in range(4)]
    assert [count(prefix) for prefix in prefixes] == [100] * 4
    assert len({prefix.split(".")[0] for prefix in prefixes}) == 4
    assert question(prefixes[0], 0) != question(prefixes[0], 1)


def test_short_prompts_are_the_same_for_the_same_seed_only():
    one, same, other = (short_prompts(seed) for seed in (1, 1, 2))
    first = [next(one) for _ in range(5)]
    assert first == [next(same) for _ in range(5)] != [next(other) for _ in range(5)]


def test_the_quick_sizes_are_small():
    assert QUICK.output_tokens * max(QUICK.concurrency) < Sizes().output_tokens
