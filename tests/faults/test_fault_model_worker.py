"""The model worker dies, hangs, babbles or is shot at; nobody who waits for its tokens may notice more than a pause."""

import os
import signal
import time

import pytest

from tests.workers.pool.harness import job, wait_dead
from tests.workers.pool.scripted_engine import EXIT, PLAIN, RAISE, WAIT, expected
from workers.entry import IGNORED_SIGNALS
from workers.messages import BeamParams, GenerateJob, StatusQuery


def worker_pid(connection) -> int:
    pid = connection.status.workers[0].pid
    assert pid is not None
    return pid


def test_streams_go_on_with_the_exact_tokens_after_kill_9(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    jobs = [job([WAIT, 10, 0, 1, i], max_tokens=25, n=1 + i % 2, seed=i) for i in range(4)]
    connection.send(*jobs)
    for each in jobs:
        for choice in range(each.n):
            connection.wait_tokens(each, 10, choice)
    os.kill(worker_pid(connection), signal.SIGKILL)
    pool.open_gate(1)
    connection.wait_answer(*jobs)
    for each in jobs:
        assert connection.started(each) == 1
        for choice in range(each.n):
            assert connection.tokens(each, choice) == expected(each, choice)


def test_a_finished_choice_is_not_delivered_again_by_the_replay(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    wanted = job([WAIT, 10, 0, 1], max_tokens=12, n=2)
    # The second choice has been delivered in full by an earlier run.
    wanted = GenerateJob(id=wanted.id, prompt=wanted.prompt, max_tokens=12, n=2, emitted=[[], expected(wanted, 1)])
    connection.send(wanted)
    connection.wait(lambda: len(connection.tokens(wanted)) == 10 and connection.finish_reasons(wanted) == {1: "length"})
    os.kill(worker_pid(connection), signal.SIGKILL)
    pool.open_gate(1)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted, 0) == expected(wanted)
    assert connection.tokens(wanted, 1) == []


def test_a_beam_search_is_replayed_and_repeats_nothing(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    plain = job([WAIT, 6, 0, 1], max_tokens=9)
    wanted = GenerateJob(id=plain.id, prompt=plain.prompt, max_tokens=9, beams=BeamParams(num_beams=4))
    connection.send(wanted)
    connection.wait_tokens(wanted, 6)
    os.kill(worker_pid(connection), signal.SIGKILL)
    pool.open_gate(1)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(plain)


@pytest.mark.parametrize("command", [EXIT, RAISE], ids=["exit", "exception"])
def test_a_worker_that_ends_in_mid_stream_is_replaced_and_the_stream_goes_on(start_pool, command):
    connection = start_pool().connect(workers=1)
    before = worker_pid(connection)
    wanted = job([command, 5, 1], max_tokens=12)
    connection.send(wanted)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)
    connection.wait_ready()
    assert worker_pid(connection) != before


def test_a_worker_that_goes_on_before_the_watchdog_strikes_is_kept(start_pool):
    pool = start_pool("--watchdog", "3")
    connection = pool.connect(workers=1)
    before = worker_pid(connection)
    wanted = job([WAIT, 5, 0, 1], max_tokens=12)
    connection.send(wanted)
    connection.wait_tokens(wanted, 5)
    os.kill(before, signal.SIGSTOP)
    connection.wait(lambda: connection.status.workers[0].state == "hung")
    os.kill(before, signal.SIGCONT)
    connection.wait_ready()
    pool.open_gate(1)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)
    assert worker_pid(connection) == before


def test_long_prompts_for_a_stopped_worker_block_neither_the_pool_nor_the_other_worker(start_pool):
    pool = start_pool("--workers", "2", "--watchdog", "8")
    connection = pool.connect(workers=2)
    stopped = worker_pid(connection)
    os.kill(stopped, signal.SIGSTOP)
    long = [job([PLAIN, *range(300_000)], max_tokens=3) for _ in range(4)]
    connection.send(*long)
    start = time.monotonic()
    short = [job([PLAIN], max_tokens=3) for _ in range(2)]
    connection.send(*short, StatusQuery())
    connection.wait(lambda: any(connection.finish_reasons(each) for each in short))
    # Before the watchdog: the other worker answers while this one still stands.
    assert time.monotonic() - start < 7.0
    connection.wait_answer(*long, *short)
    for each in (*long, *short):
        assert connection.tokens(each) == expected(each)


def test_signals_to_the_group_do_not_reach_the_model_worker(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    before = worker_pid(connection)
    wanted = job([WAIT, 3, 0, 1])
    connection.send(wanted)
    connection.wait_tokens(wanted, 3)
    for each in IGNORED_SIGNALS:
        os.kill(before, each)
    pool.open_gate(1)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)
    assert connection.status.workers[0].pid == before


def test_a_death_is_noticed_even_if_a_process_of_the_engine_holds_the_pipe(start_pool):
    pool = start_pool("--model", "scripted:child")
    connection = pool.connect(workers=1)
    os.kill(worker_pid(connection), signal.SIGKILL)
    connection.wait(lambda: connection.status.workers[0].restarts == 1, seconds=4)
    connection.wait_ready()


def test_a_model_that_cannot_be_served_ends_the_pool_with_one_line_for_the_arbiter(start_pool):
    pool = start_pool("--model", "scripted:fatal", lifeline=True)
    assert pool.process.wait(20) == 2
    assert pool.lifeline.recv(1000) == b"FATAL 2 this model cannot be served\n"


def test_a_model_that_dies_while_loading_again_and_again_ends_the_pool(start_pool):
    pool = start_pool("--model", "scripted:crash", "--backoff", "0.01", lifeline=True)
    assert pool.process.wait(30) == 1
    assert pool.lifeline.recv(1000) == b"FATAL 1 exited with code 9\n"
    assert pool.log.count("next_start_s=") == 5


def test_an_engine_that_cannot_be_imported_is_an_error_for_the_operator_not_a_loop(start_pool):
    pool = start_pool("--engine", "no_such_engine:run", lifeline=True)
    assert pool.process.wait(20) == 2
    assert b"cannot be loaded" in pool.lifeline.recv(1000)


def test_the_worker_dies_with_the_pool_even_while_it_loads(start_pool):
    pool = start_pool("--model", "scripted:wait")
    connection = pool.connect()
    connection.wait(lambda: connection.status.workers[0].state == "loading")
    pid = worker_pid(connection)
    os.kill(pool.process.pid, signal.SIGKILL)
    wait_dead([pid], 5)
