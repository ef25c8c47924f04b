"""Rows F3, F5, F6, F8, F9, F18 and F19: what the pool makes of model workers that die, stand still, or send garbage.

Everything real but the model: a pool process, worker processes with the scripted engine, sockets, signals.
"""

import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Sequence

import psutil  # type: ignore[import-untyped]
import pytest

from tests.faults.readiness import Readiness
from tests.faults.table import Row
from tests.workers.pool.harness import PATIENCE, Connection, PoolProcess, alive, descendants, job, wait_until
from tests.workers.pool.scripted_engine import (
    COMPILE,
    EXIT,
    GARBAGE,
    HALF,
    HANG,
    LOOP,
    PLAIN,
    SILENT,
    WAIT,
    crash,
    expected,
)
from workers.messages import Cancel, GenerateJob, PoolStatus

STREAMS = 32
# Streams of so many tokens take a second or more.
LONG = 300


# Two seconds are the promise; a machine that is shared may make it late. The table has what was measured.
NOTICED_S = 2 + PATIENCE / 4

# All streams of a test run at once.
ROOM = ("--max-batch", "64")


def streams(count: int = STREAMS, max_tokens: int = LONG) -> list[GenerateJob]:
    """Jobs of all kinds that go on for a while."""
    return [job([PLAIN, 0, 0, number], max_tokens, n=1 + (number % 8 == 0), seed=number) for number in range(count)]


def wait_flowing(connection: Connection, jobs: Iterable[GenerateJob], tokens: int = 5) -> None:
    """Wait until every job has some tokens."""
    for each in jobs:
        connection.wait_tokens(each, tokens)


def is_complete(connection: Connection, each: GenerateJob) -> bool:
    """Whether the job has its whole answer, every token once and in its place."""
    return (
        len(connection.finish_reasons(each)) == each.n
        and all(connection.tokens(each, choice) == expected(each, choice) for choice in range(each.n))
        and connection.started(each) == 1
    )


def judge(row: Row, connection: Connection, jobs: Sequence[GenerateJob]) -> PoolStatus:
    """Add what became of the jobs to the row; return the pool's last status."""
    status = connection.ask_status()
    row.requests += len(jobs)
    for each in jobs:
        failure = connection.failure(each)
        if failure is None:
            row.complete += is_complete(connection, each)
            row.lost += not is_complete(connection, each)
        elif connection.started(each):
            row.errors += 1
        else:
            row.refused += 1
    row.replayed = status.counters.replayed
    row.longest_gap_s = max(row.longest_gap_s, connection.longest_gap_s)
    return status


def worker_pid(connection: Connection, index: int = 0) -> int:
    pid = connection.ask_status().workers[index].pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("rounds", [10, pytest.param(100, marks=pytest.mark.nightly)])
def test_f3_an_idle_worker_is_killed_again_and_again_and_the_next_request_is_served(start_pool, row, rounds):
    pool: PoolProcess = start_pool("--backoff", "0.01")
    connection = pool.connect(workers=1)
    pool_process = psutil.Process(pool.process.pid)
    held = None
    jobs, killed = [], set()
    for number in range(rounds):
        pid = worker_pid(connection)
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        connection.wait_status(lambda status, deaths=number + 1: status.counters.worker_deaths == deaths, "the death")
        jobs.append(job([PLAIN, 0, 0, number], 3))
        connection.send(jobs[-1])
        connection.wait_answer(jobs[-1])
        connection.wait_ready()
        if number == 1:
            held = pool_process.num_fds(), pool_process.num_threads()
    assert (pool_process.num_fds(), pool_process.num_threads()) == held
    status = judge(row, connection, jobs)
    assert row.complete == rounds
    row.fault = f"SIGKILL to a model worker that waits for a job, {rounds} times; a request after each"
    row.hit = f"{len(killed)} pids died, {status.counters.worker_deaths} deaths counted"
    assert len(killed) == status.counters.worker_deaths == status.workers[0].restarts == rounds
    assert "SIGKILL" in status.workers[0].cause


@pytest.mark.parametrize(
    ("stop_s", "watchdog_s"), [(2.0, 6.0), pytest.param(5.0, 30.0, marks=pytest.mark.nightly)], ids=["short", "whole"]
)
def test_f5_a_stopped_worker_costs_a_pause_and_is_replaced_if_it_does_not_go_on(start_pool, row, stop_s, watchdog_s):
    pool: PoolProcess = start_pool(*ROOM, "--watchdog", str(watchdog_s), "--max-queue-tokens", "100000000")
    connection = pool.connect(workers=1)
    first = worker_pid(connection)
    before, after = streams(), streams()
    huge = [job([PLAIN, *range(300_000)], 3) for _ in range(4)]
    with Readiness(pool.path) as readiness:
        connection.send(*before)
        wait_flowing(connection, before)
        os.kill(first, signal.SIGSTOP)
        stopped = time.monotonic()
        connection.wait_seconds(stop_s)
        heard = len(connection.frames)
        was_stopped = psutil.Process(first).status() == psutil.STATUS_STOPPED
        os.kill(first, signal.SIGCONT)
        connection.wait_answer(*before)
        assert was_stopped
        assert len(connection.frames) > heard
        assert worker_pid(connection) == first

        connection.send(*after)
        wait_flowing(connection, after)
        os.kill(first, signal.SIGSTOP)
        stopped = time.monotonic()
        connection.send(*huge)
        connection.wait_status(lambda status: status.workers[0].state == "hung", "the standstill", 60)
        connection.wait_status(lambda status: status.counters.hangs == 1, "the watchdog", 60)
        killed_after = time.monotonic() - stopped
        connection.wait_answer(*after, *huge)
    judge(row, connection, [*before, *after, *huge])
    assert row.complete == 2 * STREAMS + 4
    assert not alive(first)
    assert readiness.slowest_answer_s < 5.0
    assert readiness.false_within(stopped) <= watchdog_s
    row.fault = f"SIGSTOP to the model worker for {stop_s:.0f} s; then for ever, while prompts of 1 MB arrive"
    row.hit = f"state T, no token for {stop_s:.0f} s; pid {first} killed by the watchdog"
    row.notes.append(f"killed after {killed_after:.0f} s ({watchdog_s:.0f} allowed)")
    row.notes.append(f"the pool's slowest answer meanwhile: {readiness.slowest_answer_s * 1e3:.0f} ms")


@pytest.mark.parametrize("command", [LOOP, HANG], ids=["a loop without steps", "a call that never returns"])
def test_f6_an_engine_that_makes_no_step_is_replaced(start_pool, row, command):
    pool: PoolProcess = start_pool(*ROOM, "--watchdog", "2")
    connection = pool.connect(workers=1)
    before = worker_pid(connection)
    mates, stuck = streams(STREAMS - 1), job([command, 20, 1], 60)
    connection.send(*mates[:16], stuck, *mates[16:])
    connection.wait_tokens(stuck, 20)
    stats = []
    while alive(before):
        if (said := connection.ask_status().workers[0].stats) is not None:
            stats.append(said)
    connection.wait_answer(stuck, *mates)
    status = judge(row, connection, [stuck, *mates])
    assert row.complete == STREAMS
    assert (status.counters.hangs, status.counters.worker_deaths) == (1, 1)
    assert "made no step" in status.workers[0].cause
    what = "loops and goes on reporting" if command == LOOP else "stands in a call"
    row.fault = f"the engine {what} without making a step, with {STREAMS} streams"
    row.hit = f"pid {before} was killed by the watchdog: {status.workers[0].cause}"
    if command == LOOP:
        # It did send frames all the time; only the steps in them stood still.
        assert stats[-1].running == STREAMS
        assert len(stats) > 2


def test_f6_a_long_prompt_and_a_long_compilation_are_left_alone(start_pool, row):
    # Long enough that a machine that is busy elsewhere does not make it hung (from a third of it on) by a stall.
    pool: PoolProcess = start_pool(*ROOM, "--watchdog", "6")
    connection = pool.connect(workers=1)
    before = worker_pid(connection)
    reading = [job([SILENT, 0, 0, number]) for number in range(STREAMS - 1)]
    compiling, flowing = job([COMPILE, 0, 0, 7], 20), job([WAIT, 3, 0, 7], 20)
    with Readiness(pool.path) as readiness:
        since = time.monotonic()
        connection.send(*reading, compiling, flowing)
        connection.wait_tokens(flowing, 3)
        connection.wait_seconds(8.0)
        # Once more with nothing but the compilation: the engine says that it has nothing to do.
        connection.send(*(Cancel(id=each.id) for each in [*reading, flowing]))
        connection.wait_seconds(8.0)
        stats = connection.ask_status().workers[0].stats
        until = time.monotonic()
        pool.open_gate(7)
        connection.wait_answer(compiling)
    status = judge(row, connection, [compiling])
    assert stats is not None
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.steps > 0
    assert (row.complete, status.counters.worker_deaths) == (1, 0)
    assert worker_pid(connection) == before
    assert readiness.always_true(since, until)
    row.fault = "prompts that take longer than the watchdog's patience to read, a grammar that takes as long"
    row.hit = f"no token for 8 s, twice, of 6 s patience; {stats.steps} steps made; same pid"


def test_f8_a_poison_among_others_is_found_and_refused_and_its_batch_mates_complete(start_pool, row):
    pool: PoolProcess = start_pool(*ROOM)
    connection = pool.connect(workers=1)
    mates = streams(STREAMS - 1)
    poison = job([EXIT, 30, 0], 60)
    connection.send(*mates[:16], poison, *mates[16:])
    connection.wait_answer(poison, *mates)
    deaths = connection.ask_status().counters.worker_deaths
    # As the openai client does after a 500 that does not forbid it.
    again = [job(poison.prompt, 60, seed=number) for number in range(2)]
    for each in again:
        connection.send(each)
        connection.wait_answer(each)
    status = judge(row, connection, [poison, *mates, *again])
    failures = [connection.failure(each) for each in [poison, *again]]
    assert [(failure.kind, failure.cause) for failure in failures if failure] == [("internal", "poison")] * 3
    assert len({failure.message for failure in failures if failure}) == 1
    assert connection.tokens(poison) == expected(poison)[:30]
    assert (row.complete, row.errors, row.refused) == (STREAMS - 1, 1, 2)
    counters = status.counters
    assert counters.worker_deaths == deaths == status.workers[0].restarts == 3
    assert (counters.poisoned, counters.refused_poison, counters.quarantined) == (1, 2, STREAMS)
    row.fault = f"a request whose 31st token always kills the worker, among {STREAMS - 1} others; sent again twice"
    row.hit = f"{deaths} workers ended with exit code 9: twice with all, once with the poison alone"


def test_f8_a_poison_that_has_the_worker_for_itself_costs_two_deaths(start_pool, row):
    connection = start_pool().connect(workers=1)
    poison, again = job([EXIT, 4, 0], 9), job([EXIT, 4, 0], 9)
    for each in (poison, again):
        connection.send(each)
        connection.wait_answer(each)
    connection.wait_ready()
    status = judge(row, connection, [poison, again])
    assert (row.errors, row.refused) == (1, 1)
    assert status.counters.worker_deaths == 2
    row.fault = "the same with nobody else there; sent again once"
    row.hit = f"{status.counters.worker_deaths} workers ended with exit code 9"


def test_f9_a_worker_that_dies_at_every_start_is_started_less_and_less_often_while_another_serves(start_pool, row):
    pool: PoolProcess = start_pool("--workers", "2", "--backoff", "0.05", "--breaker", "4")
    crash(pool.directory, 1).touch()
    connection = pool.connect(workers=1)
    since = time.monotonic()
    jobs, most = [], 0
    with Readiness(pool.path) as readiness:
        while connection.ask_status().counters.worker_deaths < 6:
            jobs += (batch := streams(8, 40))
            connection.send(*batch)
            connection.wait_answer(*batch)
            most = max(most, len(descendants(pool.process.pid)))
        until = time.monotonic()
    status = judge(row, connection, jobs)
    assert row.complete == len(jobs) >= STREAMS
    assert readiness.always_true(since, until)
    pauses = [float(each) for each in re.findall(r"next_start_s=([\d.]+)", pool.log)]
    assert pauses[:5] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert status.workers[1].cause == "exited with code 9"
    # A process is collected before the next one starts: two workers, and Python's resource tracker.
    assert most <= 3
    row.fault = "one of two model workers dies at every start"
    row.hit = f"{status.workers[1].restarts} deaths, next starts after {', '.join(f'{each:g}' for each in pauses)} s"


def test_f9_when_the_only_worker_dies_at_every_start_those_who_wait_are_told_and_it_serves_again_later(start_pool, row):
    pool: PoolProcess = start_pool(*ROOM, "--backoff", "0.1", "--breaker", "4")
    connection = pool.connect(workers=1)
    jobs = streams()
    with Readiness(pool.path) as readiness:
        connection.send(*jobs)
        wait_flowing(connection, jobs)
        crash(pool.directory, 0).touch()
        moment = time.monotonic()
        os.kill(worker_pid(connection), signal.SIGKILL)
        connection.wait_answer(*jobs)
    noticed_s = readiness.false_within(moment)
    assert noticed_s <= NOTICED_S
    assert not any(ready for at, ready in readiness.samples if at >= moment + noticed_s)
    failures = [failure for each in jobs if (failure := connection.failure(each))]
    assert [failure.kind for failure in failures] == ["unavailable"] * len(jobs)
    late = job([PLAIN], 3)
    connection.send(late)
    connection.wait_answer(late)
    told = connection.failure(late)
    assert told is not None
    assert (told.kind, told.retry_after) == ("unavailable", 30.0)
    crash(pool.directory, 0).unlink()
    connection.wait_ready()
    healthy = job([PLAIN], 3)
    connection.send(healthy)
    connection.wait_answer(healthy)
    status = judge(row, connection, [*jobs, late, healthy])
    assert (row.complete, row.errors, row.refused) == (1, len(jobs), 1)
    assert pool.process.poll() is None
    row.fault = "the only model worker is killed, and dies at every start; later it does not"
    row.hit = f"{status.workers[0].restarts} deaths, then ready"


def test_f17_the_date_jumps_by_an_hour_and_back_and_nobody_is_taken_for_dead_or_late(start_pool, row):
    pool: PoolProcess = start_pool(*ROOM, "--wall-clock", "--queue-timeout", "600")
    connection = pool.connect(workers=1)
    before = worker_pid(connection)
    dates = pool.directory / "dates"
    held = [job([WAIT, 3, 0, 5, number], 20) for number in range(STREAMS)]
    connection.send(*held)
    wait_flowing(connection, held, 3)
    jobs = []
    with Readiness(pool.path) as readiness:
        since = time.monotonic()
        for seconds in (3600, -3600, 0):
            (pool.directory / "wall-clock").write_text(str(seconds))
            # What is logged meanwhile has the new date.
            jobs += (batch := streams(4, 20))
            connection.send(*batch)
            connection.wait_answer(*batch)
            wait_until(lambda seconds=seconds: f"{seconds}\n" in dates.read_text(), "a look at the date")
        until = time.monotonic()
    pool.open_gate(5)
    connection.wait_answer(*held)
    status = judge(row, connection, [*held, *jobs])
    assert row.complete == len(held) + len(jobs)
    assert (status.counters.worker_deaths, status.counters.queue_timeouts) == (0, 0)
    assert worker_pid(connection) == before
    assert readiness.always_true(since, until)
    row.fault = "the date jumps an hour ahead, two hours back, and to where it was"
    row.hit = f"the pool saw it {len(set(dates.read_text().split()))} ways; same pid"


@pytest.mark.parametrize("command", [GARBAGE, HALF], ids=["garbage", "half a frame, then death"])
def test_f18_what_is_no_frame_from_a_worker_is_its_death(start_pool, row, command):
    connection = start_pool(*ROOM).connect(workers=1)
    before = worker_pid(connection)
    mates, babbler = streams(STREAMS - 1), job([command, 20, 1], 60)
    connection.send(*mates, babbler)
    connection.wait_answer(*mates, babbler)
    status = judge(row, connection, [*mates, babbler])
    assert row.complete == STREAMS
    assert not alive(before)
    assert status.counters.worker_deaths == 1
    if command == GARBAGE:
        assert "sent garbage" in status.workers[0].cause
    row.fault = f"{'garbage' if command == GARBAGE else 'half a frame, then its end,'} from the model worker"
    row.hit = f"its last life {status.workers[0].cause}"


def test_f18_what_is_no_frame_from_a_client_cuts_off_that_client_alone(start_pool, row):
    pool: PoolProcess = start_pool(*ROOM)
    connection = pool.connect(workers=1)
    jobs = streams()
    connection.send(*jobs)
    wait_flowing(connection, jobs)
    frames = [
        b"\x00\x00\x00\x05\xff\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"GET / HTTP/1.1\r\nHost: pool\r\n\r\n",
        b"\x00\x00\x00\x09\x80\x04K\x01.pickle",
    ]
    cut = 0
    for data in [*frames, b"\x00\x00\x01\x00 half a frame"]:
        babbler = Connection(pool.path)
        babbler.wait(lambda babbler=babbler: babbler.status)
        babbler.send(job([SILENT]))
        babbler.socket.sendall(data)
        if data not in frames:
            babbler.socket.shutdown(socket.SHUT_WR)
        babbler.wait_end()
        babbler.close()
        cut += 1
    connection.wait_status(lambda status: status.running <= STREAMS, "the cancels")
    connection.wait_answer(*jobs)
    status = judge(row, connection, jobs)
    assert row.complete == STREAMS
    assert (status.counters.worker_deaths, status.counters.cancelled) == (0, cut)
    row.fault = "garbage, a length of 2 GB, HTTP, pickle and half a frame on the pool's socket"
    row.hit = f"{cut} connections were cut, and their jobs cancelled"


def test_f19_ready_means_that_a_token_can_be_made_now(start_pool, row):
    pool: PoolProcess = start_pool(
        "--model", "scripted:wait", "--watchdog", "6", "--max-batch", "4", "--max-queue", "8"
    )
    connection = pool.connect()
    with Readiness(pool.path) as readiness:
        connection.wait_status(lambda status: status.workers[0].state == "loading", "the loading")
        assert not connection.ask_status().ready
        pool.open_gate(0)
        connection.wait_ready()
        assert connection.ask_status().ready
        busy_since = time.monotonic()
        jobs = streams(40, 60)
        connection.send(*jobs)
        connection.wait_answer(*jobs)
        assert readiness.always_true(busy_since, time.monotonic())
        # Death: the next life loads until the gate opens again.
        (pool.directory / "gate-0").unlink()
        killed = time.monotonic()
        os.kill(worker_pid(connection), signal.SIGKILL)
        connection.wait_status(lambda status: status.workers[0].state == "loading", "the loading")
        assert not connection.ask_status().ready
        pool.open_gate(0)
        connection.wait_ready()
        # A hang: it says so within the watchdog's patience, and is ready again with the next life.
        stuck = job([HANG, 2, 1], 6)
        hung = time.monotonic()
        connection.send(stuck)
        connection.wait_answer(stuck)
        # Told to stop, a pool without an arbiter lets running jobs finish, and is not ready from then on.
        last = job([WAIT, 2, 0, 5], 6)
        connection.send(last)
        connection.wait_tokens(last, 2)
        os.kill(pool.process.pid, signal.SIGTERM)
        wait_until(lambda: not connection.ask_status().ready, "the drain")
        judge(row, connection, [*jobs, stuck, last][:-1])
        pool.open_gate(5)
        connection.wait_answer(last)
    row.requests += 1
    row.complete += is_complete(connection, last)
    assert pool.process.wait(20) == 0
    assert readiness.false_within(killed) <= NOTICED_S
    # From a third of the watchdog's patience on it is not ready; it is killed at its end.
    assert readiness.false_within(hung) <= 6 + NOTICED_S
    assert (row.errors, row.lost) == (0, 0)
    assert row.refused >= 1
    row.fault = "loading, full load with a full queue, death, hang, drain"
    row.hit = (
        f"not ready {readiness.false_within(killed):.1f} s after the death, {readiness.false_within(hung):.1f} s after "
        "the hang; ready in every sample under load"
    )
