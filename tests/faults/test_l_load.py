"""The battery's rows L1, L2, L3, L7, L8: as much as there is room for, and more.

The short forms are for two cores that others use too: they judge what became of each request strictly, and times only
against times of the same minute. The nightly forms are longer and judge times as the battery does.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import wait_until
from tests.faults.load_clients import (
    Seen,
    ask,
    ask_all,
    asked_again_and_again,
    chat,
    connect,
    leave,
    quantile,
    request_bytes,
    run,
)
from tests.faults.rig import Rig
from tests.faults.table import Row
from workers.messages import Stats

GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True, "stream": True}


def story(number: int, **fields: Any) -> dict[str, Any]:
    """A stream that goes on up to its ``max_tokens``; the same for the same arguments."""
    return chat(f"Tell me story number {number}.", **{**GREEDY, **fields})


def count(row: Row, seen: Sequence[Seen]) -> None:
    """Add what became of the requests."""
    verdicts = Counter(each.verdict for each in seen)
    row.requests += len(seen)
    row.complete += verdicts["complete"]
    row.errors += verdicts["error"]
    row.refused += verdicts["refused"]
    row.lost += verdicts["lost"]
    row.longest_gap_s = max([row.longest_gap_s, *(each.longest_gap_s for each in seen)])
    for each in seen:
        if each.status == 429:
            assert int(each.headers["retry-after"]) >= 1


# --- L1


def hold(row: Row, streams: int, stories: int, tokens: int, seconds: float = 0.0) -> None:
    """As many streams as there may be, again and again for so long; each must say what it says alone."""
    row.fault = f"{streams} streams at once, all that the model worker takes, of {tokens} tokens each"
    with Rig(max_batch=streams, max_queue=0, max_queue_tokens=0, step_s=0.002) as rig:
        bodies = [story(number, max_tokens=tokens) for number in range(stories)]
        alone = [run(ask(rig.port, body)) for body in bodies]
        assert all(each.whole for each in alone)
        until = time.monotonic() + seconds
        rounds = 0
        while rounds == 0 or time.monotonic() < until:
            seen = run(ask_all(rig.port, [bodies[place % stories] for place in range(streams)]))
            count(row, seen)
            for place, each in enumerate(seen):
                assert (each.texts, each.reasons) == (alone[place % stories].texts, {0: "length"})
            together = min(each.ended for each in seen) - max(each.arrivals[0] for each in seen)
            assert together > 0, "not all of them ran at the same time"
            rounds += 1
    row.hit = f"the last of them had its first token {together:.1f} s before the first of them ended"
    row.notes.append(
        f"{rounds} rounds, {stories} different prompts; each text equals that of its solo greedy run in fp32"
    )


def test_l1_every_stream_that_may_run_at_once_says_what_it_says_alone(row: Row) -> None:
    hold(row, streams=64, stories=8, tokens=120)


@pytest.mark.nightly
def test_l1_every_stream_there_can_be_for_ten_minutes(row: Row) -> None:
    hold(row, streams=128, stories=32, tokens=1800, seconds=600)


# --- L2


class Round:
    """Closed-loop clients for some seconds, and what they got."""

    def __init__(self, rig: Rig, clients: int, seconds: float, tokens: int) -> None:
        began = time.monotonic()

        async def all_of_them() -> list[list[Seen]]:
            bodies = [lambda number: story(number, max_tokens=tokens)] * clients
            tasks = (
                asked_again_and_again(rig.port, body, number, began + seconds) for number, body in enumerate(bodies)
            )
            return list(await asyncio.gather(*tasks))

        self.seen = [each for client in run(all_of_them()) for each in client]
        self.seconds = time.monotonic() - began
        self.complete = [each for each in self.seen if each.verdict == "complete"]
        self.refused = [each for each in self.seen if each.status == 429]
        self.goodput = tokens * len(self.complete) / self.seconds
        self.first_token_s = quantile([each.seconds_to_text for each in self.complete], 0.5)


def overload(row: Row, seconds: float, *, goodput: float, refusal_s: float) -> None:
    """1x, then 10x, then 1x again; ``goodput`` is the share of 1x that 10x must keep."""
    capacity = 4
    row.fault = (
        f"{10 * capacity} clients where {capacity} keep the model busy, for {seconds:.0f} s; they obey Retry-After"
    )
    with Rig(max_batch=capacity, max_queue=capacity, step_s=0.01) as rig:
        before = Round(rig, capacity, seconds, 24)
        over = Round(rig, 10 * capacity, seconds, 24)
        after = Round(rig, capacity, seconds, 24)
        status = rig.pool_status()
    for each in (before, over, after):
        count(row, each.seen)
    refusals = [each.seconds_to_answer for each in over.refused]
    assert len(over.refused) > 10 * capacity, "it was no overload"
    assert not before.refused
    assert not [each for each in after.seen[capacity:] if each.status == 429]
    retry_after = sorted(int(each.headers["retry-after"]) for each in over.refused)
    assert 1 <= retry_after[0] <= retry_after[-1] <= 60
    assert quantile(refusals, 0.5) < refusal_s, refusals
    assert over.goodput > goodput * before.goodput, (before.goodput, over.goodput)
    # A request that waits for a full queue, and no more.
    assert after.first_token_s < 3 * before.first_token_s + 0.5
    assert status.queued == 0
    row.hit = f"{len(over.refused)} of {len(over.seen)} requests got 429"
    row.notes.append(
        f"429 after {1000 * quantile(refusals, 0.5):.0f} ms (median; p99 {1000 * quantile(refusals, 0.99):.0f} ms), "
        f"Retry-After {retry_after[0]} to {retry_after[-1]} s; goodput {before.goodput:.0f}, {over.goodput:.0f} and "
        f"again {after.goodput:.0f} tokens/s; first token {before.first_token_s:.2f}, {over.first_token_s:.2f} and "
        f"again {after.first_token_s:.2f} s"
    )


def test_l2_ten_times_the_load_is_refused_quickly_and_the_rest_is_served(row: Row) -> None:
    overload(row, 3.0, goodput=0.5, refusal_s=1.0)


@pytest.mark.nightly
def test_l2_ten_times_the_load_for_five_minutes(row: Row) -> None:
    overload(row, 300.0, goodput=0.9, refusal_s=0.1)


# --- L3


def test_l3_what_waits_too_long_or_is_not_wanted_any_more_never_starts(row: Row) -> None:
    row.fault = "queued behind long streams: 6 requests whose time is over before their turn, 12 whose clients leave"
    # Longer than the three before them together: whatever is read of one of them shows.
    words = "How do I make a personal website? " * 60
    with Rig(max_batch=1, max_queue=64, step_s=0.02) as rig:
        # One that runs, and two that the worker has beforehand. They go on until their clients leave too.
        long = [connect(rig.port) for _ in range(3)]
        for connection in long:
            connection.sendall(request_bytes(story(1, max_tokens=1900)))
        wait_until(lambda: rig.pool_status().running == 3, "the long streams", 60)
        wait_until(lambda: _stats(rig).output_tokens > 0, "tokens of the long streams", 60)

        gone = []
        for place in range(12):
            connection = connect(rig.port)
            connection.sendall(request_bytes(chat(words, max_tokens=100, stream=place % 3 > 0)))
            gone.append(connection)
        wait_until(lambda: rig.pool_status().queued == 12, "the queue", 60)
        left_at = time.monotonic()
        for place, connection in enumerate(gone):
            leave(connection, reset=place % 2 == 0)
        wait_until(lambda: rig.pool_status().queued == 0, "their removal", 60)
        removed_s = time.monotonic() - left_at

        asked = [chat(words, max_tokens=100, timeout=1.0, stream=place % 2 == 0) for place in range(6)]
        late = run(ask_all(rig.port, asked))
        status, stats = rig.pool_status(), _stats(rig)
        for connection in long:
            leave(connection, reset=False)
        wait_until(lambda: rig.pool_status().running == 0, "the end", 60)
        idle = _stats(rig)
    assert [each.verdict for each in late] == ["refused"] * 6
    for place, each in enumerate(late):
        assert each.error is not None
        assert each.error["type"] == "rate_limit_error"
        assert each.texts.get(0, "") == ""
        # Headers and role of a stream go out early, so its refusal is an event.
        assert each.status == (200 if place % 2 == 0 else 429)
    assert (status.running, status.queued, status.counters.queue_timeouts) == (3, 0, 6)
    # Of none of the 18 a single token was read.
    assert 0 < stats.prompt_tokens <= idle.prompt_tokens < 3 * 60
    count(row, late)
    row.requests += len(gone) + len(long)
    row.errors += len(gone) + len(long)
    waited = quantile([each.ended - each.began for each in late], 0.99)
    row.hit = (
        f"all 18 stood in the pool's queue; the model worker read {idle.prompt_tokens} prompt tokens, of none of them"
    )
    row.notes.append(
        f"clients that left (they and the long streams count as errors) were out of the queue after {removed_s:.2f} s; "
        f"429, as a status or an event, after {waited:.2f} s where 1 s was the limit"
    )


def _stats(rig: Rig) -> Stats:
    return rig.pool_status().workers[0].stats or Stats(steps=0, running=0, waiting=0, blocks_used=0, blocks_total=0)


# --- L7


def saturate(row: Row, clients: int, tokens: int, *, goodput: float) -> None:
    """Default openai clients on a server that is full: two retries each, as the library makes them."""
    capacity = 4
    row.fault = f"{clients} openai clients with their two retries at once, where {capacity} keep the model busy"
    answers: list[tuple[int, str | None]] = []
    outcomes: Counter[str] = Counter()
    with Rig(max_batch=capacity, max_queue=8, step_s=0.01) as rig:
        alone = Round(rig, capacity, 2.0, tokens)
        hooks = {
            "response": [lambda response: answers.append((response.status_code, response.headers.get("retry-after")))]
        }

        # To make a client takes longer than to serve it: those made at once would not ask at once.
        made = [
            openai.OpenAI(
                base_url=f"{rig.url}/v1",
                api_key="none",
                http_client=httpx.Client(event_hooks=hooks, timeout=120, verify=False),
            )
            for _ in range(clients)
        ]
        assert {each.max_retries for each in made} == {2}
        all_there = threading.Barrier(clients, timeout=120)

        def client(number: int) -> None:
            with made[number] as one:
                all_there.wait()
                body = story(number, max_tokens=tokens)
                extra = {name: body[name] for name in ("ignore_eos", "repetition_penalty")}
                try:
                    parts = one.chat.completions.create(
                        model="tiny", messages=body["messages"], max_tokens=tokens, stream=True, extra_body=extra
                    )
                    reason = [part.choices[0].finish_reason for part in parts][-1]
                    outcomes["complete" if reason == "length" else "lost"] += 1
                except openai.RateLimitError:
                    outcomes["refused"] += 1

        began = time.monotonic()
        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        status = rig.pool_status()
    assert sum(outcomes.values()) == clients, outcomes
    statuses = Counter(code for code, _ in answers)
    assert set(statuses) <= {200, 429}
    assert all(after is not None and int(after) >= 1 for code, after in answers if code == 429)
    assert statuses[429] >= clients // 4, "it was not saturated"
    # No client asked more often than its library does, and the model was busy meanwhile, not the door.
    assert len(answers) <= 3 * clients
    rate = tokens * outcomes["complete"] / seconds
    assert rate > goodput * alone.goodput, (rate, alone.goodput)
    assert (status.queued, status.running) == (0, 0)
    count(row, alone.seen)
    row.requests += clients
    row.complete += outcomes["complete"]
    row.refused += outcomes["refused"]
    row.lost += outcomes["lost"]
    row.hit = f"{statuses[429]} answers were 429, each with Retry-After; {len(answers)} requests in all"
    row.notes.append(f"{rate:.0f} tokens/s to those served, {alone.goodput:.0f} to {capacity} clients alone")


def test_l7_retries_of_openais_client_do_not_pile_up(row: Row) -> None:
    saturate(row, 32, 24, goodput=0.25)


@pytest.mark.nightly
def test_l7_a_thousand_clients_of_openai_retry(row: Row) -> None:
    saturate(row, 1000, 24, goodput=0.5)


# --- L8


def crowd_out(row: Row, streams: int, tokens: int, long_prompts: int) -> None:
    """Long prompts and a request for 128 choices beside running streams."""
    row.fault = f"{long_prompts} prompts of 1,800 tokens and two requests with n=128 beside {streams} streams"
    words = "How do I make a personal website? First, buy a domain name. "
    with Rig(max_batch=128, step_s=0.004) as rig:
        bodies = [story(number, max_tokens=tokens) for number in range(streams)]
        normal = run(ask_all(rig.port, bodies))
        unready: list[int] = []
        over = threading.Event()

        def watch() -> None:
            with httpx.Client(base_url=rig.url, timeout=30) as http:
                while not over.wait(0.1):
                    if http.get("/readyz").status_code != 200:
                        unready.append(1)

        watcher = threading.Thread(target=watch)
        watcher.start()

        async def disturbed() -> tuple[list[Seen], list[Seen], Seen]:
            running = asyncio.Event()
            first = asyncio.gather(*(ask(rig.port, body, on_text=running.set) for body in bodies))
            await running.wait()
            prompts = [chat(f"{place} " + words * 68, **{**GREEDY, "max_tokens": 8}) for place in range(long_prompts)]
            wide = [story(100 + place, n=128, max_tokens=8, temperature=0.8) for place in range(2)]
            other = asyncio.gather(*(ask(rig.port, body) for body in [*prompts, *wide]))
            # The sequences of the wide requests fill the batch: another request, of one, has to wait for its turn.
            await asyncio.sleep(0)
            behind = await ask(rig.port, story(7, max_tokens=8))
            return await first, await other, behind

        seen, others, behind = run(disturbed())
        over.set()
        watcher.join()
    count(row, [*normal, *seen, *others, behind])
    assert [each.verdict for each in (*seen, *others, behind)] == ["complete"] * (streams + long_prompts + 3)
    assert not unready, "not ready although nothing was wrong"
    assert [each.texts for each in seen] == [each.texts for each in normal]
    for wide in others[-2:]:
        assert set(wide.reasons) == set(range(128))
    before, during = (quantile([gap for each in group for gap in each.gaps()], 0.99) for group in (normal, seen))
    # Long prompts are read in slices beside the streams, so nobody waits for a whole one (about a second here).
    assert during < 10 * before + 0.5, (before, during)
    told = [comment for each in (*others, behind) for comment in each.comments if comment.startswith(": queued")]
    row.hit = (
        f"{long_prompts} x 1,800 prompt tokens and 256 sequences where 128 fit: {len(told)} places in the queue told"
    )
    row.notes.append(
        f"token gaps of the streams, p99: {1000 * before:.0f} ms alone, {1000 * during:.0f} ms beside; ready throughout"
    )


def test_l8_long_prompts_and_many_choices_stop_nobody(row: Row) -> None:
    crowd_out(row, streams=24, tokens=150, long_prompts=8)


@pytest.mark.nightly
def test_l8_more_of_them(row: Row) -> None:
    crowd_out(row, streams=60, tokens=600, long_prompts=32)
