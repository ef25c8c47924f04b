"""Jobs through a real pool process with a real worker process, over a real socket."""

import os

import psutil  # type: ignore[import-untyped]
import pytest

from tests.workers.pool.harness import alive, job, wait_until
from tests.workers.pool.scripted_engine import EXIT, PLAIN, REFUSE, SILENT, WAIT, expected
from workers.messages import Cancel, Embedded, EmbedJob, Queued, StatusQuery


def test_a_job_gets_its_tokens_in_order_and_its_finish_reason(start_pool):
    connection = start_pool().connect(workers=1)
    wanted = job([PLAIN, 7], max_tokens=50, seed=3)
    connection.send(wanted)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)
    assert connection.finish_reasons(wanted) == {0: "length"}
    assert connection.started(wanted) == 1


def test_many_jobs_of_many_clients_never_mix(start_pool):
    pool = start_pool("--workers", "2", "--max-batch", "4")
    connections = [pool.connect(workers=2) for _ in range(4)]
    jobs = [[job([PLAIN, c, i], max_tokens=20, n=1 + i % 3) for i in range(10)] for c in range(4)]
    for connection, wanted in zip(connections, jobs, strict=True):
        connection.send(*wanted)
    for connection, wanted in zip(connections, jobs, strict=True):
        connection.wait_answer(*wanted)
        assert set(connection.events) == {each.id for each in wanted}
        for each in wanted:
            for choice in range(each.n):
                assert connection.tokens(each, choice) == expected(each, choice)


def test_everything_of_one_step_comes_in_one_frame(start_pool):
    connection = start_pool().connect(workers=1)
    jobs = [job([PLAIN, i], max_tokens=100) for i in range(16)]
    connection.send(*jobs)
    connection.wait_answer(*jobs)
    assert max(len(frame.events) for frame in connection.frames) >= 16


def test_an_embedding_is_passed_on(start_pool):
    connection = start_pool().connect(workers=1)
    connection.send(EmbedJob(id="e", prompt=[1, 2, 3]))
    connection.wait(lambda: any(isinstance(event, Embedded) for event in connection.events.get("e", [])))


def test_a_refusal_of_the_engine_reaches_the_client_with_its_text(start_pool):
    connection = start_pool().connect(workers=1)
    wanted = job([REFUSE])
    connection.send(wanted)
    connection.wait_answer(wanted)
    assert connection.failure(wanted).kind == "invalid"
    assert connection.failure(wanted).message == "refused as told"


def test_jobs_beyond_the_batch_wait_and_beyond_the_queue_are_told_when_to_ask_again(start_pool):
    pool = start_pool("--max-batch", "1", "--max-queue", "2")
    connection = pool.connect(workers=1)
    jobs = [job([WAIT, 0, 0, 1], max_tokens=2) for _ in range(6)]
    connection.send(*jobs)
    connection.wait(lambda: connection.failure(jobs[5]))
    assert connection.failure(jobs[5]).kind == "overloaded"
    assert connection.failure(jobs[5]).retry_after >= 1
    connection.status = None
    connection.send(StatusQuery())
    connection.wait(lambda: connection.status)
    assert (connection.status.queued, connection.status.running) == (2, 3)
    assert connection.status.ready
    pool.open_gate(1)
    connection.wait_answer(*jobs)
    assert [connection.tokens(each) for each in jobs[:5]] == [expected(each) for each in jobs[:5]]


def test_a_cancelled_job_frees_its_place_at_once_whether_it_waits_or_runs(start_pool):
    pool = start_pool("--max-batch", "1")
    connection = pool.connect(workers=1)
    stuck = [job([SILENT], max_tokens=2) for _ in range(3)]
    waiting, last = job([PLAIN], max_tokens=2), job([PLAIN], max_tokens=2)
    connection.send(*stuck, waiting, last)
    connection.send(Cancel(id=waiting.id))
    connection.send(*(Cancel(id=each.id) for each in stuck))
    connection.wait_answer(last)
    assert [type(event) for event in connection.events[waiting.id]] == [Queued]


def test_one_choice_can_be_cancelled_and_the_others_go_on(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    wanted = job([WAIT, 5, 0, 1], max_tokens=10, n=3)
    connection.send(wanted)
    connection.wait_tokens(wanted, 5, choice=2)
    connection.send(Cancel(id=wanted.id, choice=1))
    pool.open_gate(1)
    connection.wait(lambda: set(connection.finish_reasons(wanted)) == {0, 2})
    connection.send(StatusQuery())
    connection.wait(lambda: connection.status.running == 0)
    assert connection.tokens(wanted, 0) == expected(wanted, 0)
    assert connection.tokens(wanted, 2) == expected(wanted, 2)


def test_a_client_that_leaves_takes_all_its_jobs_along(start_pool):
    pool = start_pool("--max-batch", "1")
    leaving, staying = pool.connect(workers=1), pool.connect(workers=1)
    leaving.send(*(job([SILENT]) for _ in range(5)))
    leaving.close()
    wanted = job([PLAIN])
    staying.send(wanted)
    staying.wait_answer(wanted)
    assert staying.tokens(wanted) == expected(wanted)


def test_a_client_cannot_cancel_the_job_of_another(start_pool):
    pool = start_pool()
    owner, other = pool.connect(workers=1), pool.connect(workers=1)
    wanted = job([WAIT, 3, 0, 1])
    owner.send(wanted)
    owner.wait_tokens(wanted, 3)
    other.send(Cancel(id=wanted.id), StatusQuery())
    other.status = None
    other.wait(lambda: other.status)
    pool.open_gate(1)
    owner.wait_answer(wanted)
    assert owner.tokens(wanted) == expected(wanted)


def test_a_job_id_used_twice_cuts_off_the_client_that_did_it(start_pool):
    pool = start_pool()
    connection, bystander = pool.connect(workers=1), pool.connect(workers=1)
    wanted = job([SILENT])
    connection.send(wanted, wanted)
    connection.wait_end()
    after = job([PLAIN])
    bystander.send(after)
    bystander.wait_answer(after)


def test_while_the_first_model_is_loading_jobs_are_refused_and_status_says_why(start_pool):
    pool = start_pool("--model", "scripted:wait")
    connection = pool.connect()
    connection.wait(lambda: connection.status and connection.status.workers[0].state == "loading")
    assert not connection.status.ready
    assert connection.status.workers[0].progress == 0.5
    early = job([PLAIN])
    connection.send(early)
    connection.wait_answer(early)
    assert connection.failure(early).kind == "unavailable"
    assert connection.failure(early).retry_after > 0
    pool.open_gate(0)
    assert connection.wait_ready().card_path.endswith("card.json")


def test_jobs_wait_while_the_only_worker_is_started_again(start_pool):
    pool = start_pool("--backoff", "0.5")
    connection = pool.connect(workers=1)
    (worker,) = connection.status.workers
    os.kill(worker.pid, 9)
    connection.wait(lambda: connection.status.workers[0].state == "dead")
    wanted = job([PLAIN])
    connection.send(wanted)
    connection.wait_answer(wanted)
    assert connection.tokens(wanted) == expected(wanted)
    assert not alive(worker.pid)


def test_a_job_that_kills_every_worker_it_has_for_itself_fails_at_the_second_death_and_its_like_is_refused(start_pool):
    pool = start_pool()
    connection = pool.connect(workers=1)
    poison, again = job([EXIT, 4, 0], max_tokens=9), job([EXIT, 4, 0], max_tokens=9, seed=5)
    for each in (poison, again):
        connection.send(each)
        connection.wait_answer(each)
        assert (connection.failure(each).kind, connection.failure(each).cause) == ("internal", "poison")
    assert connection.tokens(poison) == expected(poison)[:4]
    assert connection.tokens(again) == []
    healthy = job([PLAIN])
    connection.send(healthy)
    connection.wait_answer(healthy)
    assert connection.status.workers[0].restarts == 2


def test_the_least_loaded_worker_is_chosen(start_pool):
    pool = start_pool("--workers", "2")
    connection = pool.connect(workers=2)
    connection.send(*(job([SILENT]) for _ in range(6)), StatusQuery())
    connection.status = None
    connection.wait(lambda: connection.status)
    assert [worker.jobs for worker in connection.status.workers] == [3, 3]


def test_the_socket_is_private_and_comes_back_if_somebody_removes_it(start_pool, directory):
    pool = start_pool()
    pool.connect(workers=1)
    assert (directory / "pool.sock").stat().st_mode & 0o777 == 0o600
    (directory / "pool.sock").unlink()
    wait_until((directory / "pool.sock").exists, "the socket")
    pool.connect(workers=1)


def test_a_second_pool_for_the_same_directory_refuses_to_start(start_pool):
    first = start_pool()
    first.connect(workers=1)
    second = start_pool()
    assert second.process.wait(20) == 2
    assert "another pool already serves" in second.log
    first.connect(workers=1)


@pytest.mark.parametrize("module", ["torch", "transformers", "gevent"])
def test_the_pool_process_has_loaded_no_heavy_library(start_pool, module):
    pool = start_pool()
    pool.connect(workers=1)
    mapped = {each.path for each in psutil.Process(pool.process.pid).memory_maps()}
    assert not [path for path in mapped if f"/{module}/" in path]
