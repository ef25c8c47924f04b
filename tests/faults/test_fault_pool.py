"""The pool is told to stop, or is killed: nothing of it may stay."""

import os
import signal
from pathlib import Path

import pytest

from tests.workers.pool.harness import alive, descendants, job, wait_dead, wait_until
from tests.workers.pool.scripted_engine import HANG, PLAIN, WAIT, expected


def test_kill_9_leaves_no_model_worker(start_pool):
    pool = start_pool("--workers", "2")
    pool.connect(workers=2)
    children = descendants(pool.process.pid)
    assert len(children) >= 2
    os.kill(pool.process.pid, signal.SIGKILL)
    wait_dead(children, 5)


def test_a_new_pool_takes_over_the_place_of_a_killed_one(start_pool):
    first = start_pool()
    first.connect(workers=1)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    connection = start_pool().connect(workers=1)
    wanted = job([PLAIN])
    connection.send(wanted)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)


@pytest.mark.parametrize("state", ["idle", "streaming", "hung", "loading"])
def test_the_end_of_the_lifeline_ends_everything(start_pool, state):
    pool = start_pool("--model", "scripted:wait" if state == "loading" else "scripted:plain", lifeline=True)
    connection = pool.connect(workers=0 if state == "loading" else 1)
    if state == "loading":
        connection.wait(lambda: connection.status.workers[0].state == "loading")
    elif state != "idle":
        wanted = job([HANG if state == "hung" else WAIT, 3, 0, 1])
        connection.send(wanted)
        connection.wait_tokens(wanted, 3)
    children = descendants(pool.process.pid)
    pool.lifeline.close()
    assert pool.process.wait(10) == 0
    wait_dead(children, 5)
    assert not (pool.directory / "pool.sock").exists()
    connection.wait_end()
    if state in ("streaming", "hung"):
        assert connection.failure(wanted).kind == "unavailable"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_with_a_lifeline_signals_to_the_group_are_the_arbiters_business(start_pool, number):
    pool = start_pool(lifeline=True)
    connection = pool.connect(workers=1)
    wanted = job([WAIT, 3, 0, 1])
    connection.send(wanted)
    connection.wait_tokens(wanted, 3)
    os.killpg(pool.process.pid, number)
    pool.open_gate(1)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)
    assert alive(pool.process.pid)


def test_a_pool_of_its_own_drains_on_term_and_then_leaves(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    children = descendants(pool.process.pid)
    running = job([WAIT, 3, 0, 1])
    connection.send(running)
    connection.wait_tokens(running, 3)
    os.kill(pool.process.pid, signal.SIGTERM)
    connection.wait(lambda: connection.status.draining and not connection.status.ready)
    late = job([PLAIN])
    connection.send(late)
    connection.wait_answer(late)
    assert connection.failure(late).kind == "unavailable"
    pool.open_gate(1)
    connection.wait_answer(running)
    assert connection.tokens(running) == expected(running)
    assert pool.process.wait(10) == 0
    wait_dead(children, 5)


def test_a_second_term_or_the_end_of_the_time_for_draining_stops_at_once(start_pool):
    pool = start_pool("--drain", "60")
    connection = pool.connect(workers=1)
    stuck = job([WAIT, 3, 0, 1])
    connection.send(stuck)
    connection.wait_tokens(stuck, 3)
    os.kill(pool.process.pid, signal.SIGTERM)
    connection.wait(lambda: connection.status.draining)
    os.kill(pool.process.pid, signal.SIGTERM)
    assert pool.process.wait(10) == 0
    connection.wait_end()
    assert connection.failure(stuck).kind == "unavailable"


def test_nothing_is_left_in_shared_memory_after_an_orderly_end(start_pool):
    pool = start_pool(lifeline=True)
    pool.connect(workers=1)
    used = {path for pid in (pool.process.pid, *descendants(pool.process.pid)) for path in shared_memory(pid)}
    assert used
    assert all(map(Path.exists, used))
    pool.lifeline.close()
    pool.process.wait(10)
    wait_until(lambda: not any(map(Path.exists, used)), "the semaphores' end")


def shared_memory(pid: int) -> set[Path]:
    """The files in shared memory that the process has mapped; those of other processes are none of our business.

    Who makes a semaphore has it mapped under a name that it had for a moment; who opens it, under its own.
    """
    paths = (line.partition("/dev/shm/")[2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {Path("/dev/shm", path) for path in paths if path and not path.endswith("(deleted)")}
