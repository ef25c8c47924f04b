"""Battery F1, F2, F4, F7: model workers with the real engine die, fail and run out of memory under mixed requests.

Everything is the real service but for the model, a tiny random one, and the faults that are asked of it (`rig_engine`).
In CI one kill for each row; ``nightly`` more of them, at random moments, with more requests.
"""

import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e.server import wait_until
from tests.faults.rig import CHAT, KINDS, Ask, Record, Rig, ask_of, mixed, tally
from tests.faults.rig_engine import KILL, MEMORY, RAISE, SEGV, STICKY, hits
from tests.faults.table import Row

# Each kind once; each kind three times.
SHORT = len(KINDS)
FULL = 3 * SHORT
# With every pass made slow, so many seconds of streaming are there to be disturbed.
STEP_S = 0.01


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One model worker, as on a machine with one GPU or none. It is started anew by those who kill it."""
    with Rig(step_s=STEP_S) as started:
        yield started


@pytest.fixture(scope="module")
def short_references(rig: Rig) -> dict[str, Record]:
    """What the requests of the short rows get alone and undisturbed."""
    return rig.alone(mixed(SHORT))


def faulty(seed: int, **more: object) -> Ask:
    """A request that has the fault of ``seed`` in mid-stream."""
    body = {"model": "tiny", "max_tokens": 40, "seed": seed, "temperature": 1.0, "ignore_eos": True, **more}
    return Ask(f"fault {seed}", CHAT, {**body, "messages": [{"role": "user", "content": "Tell me of Paris."}]})


def kill_one(rig: Rig) -> int:
    """Kill the busiest model worker; return its pid."""
    workers = [worker for worker in rig.pool_status().workers if worker.pid is not None]
    pid = max(workers, key=lambda worker: worker.jobs).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def deaths(rig: Rig) -> int:
    return sum(worker.restarts for worker in rig.pool_status().workers)


def kill_under(rig: Rig, row: Row, asks: list[Ask], references: dict[str, Record], kills: list[int]) -> None:
    """Kill a model worker whenever the clients together have seen so many events; judge what they got."""
    before, jobs = deaths(rig), 0
    crowd = rig.start(asks)
    for count in kills:
        crowd.wait_events(count)
        jobs += max(worker.jobs for worker in rig.pool_status().workers)
        pid = kill_one(rig)
        wait_until(lambda pid=pid: pid not in rig.worker_pids(), "the worker's end", 20)
    failed = tally(row, crowd.finish(), references)
    assert not failed, failed[0]
    rig.wait_workers()
    row.replayed += jobs
    died = deaths(rig) - before
    assert died >= len(kills)
    assert jobs
    row.hit = f"{died} workers died with {jobs} jobs in flight, restarts counted by the pool"


# --- F1: two workers --------------------------------------------------------------------------------------------------


def test_f1_a_worker_is_killed_and_its_requests_go_on_elsewhere(row: Row, short_references: dict[str, Record]) -> None:
    row.fault = "SIGKILL of one of two model workers in mid-stream, all kinds of requests"
    with Rig(step_s=STEP_S, workers=2) as rig:
        kill_under(rig, row, mixed(SHORT), short_references, [60])


@pytest.mark.nightly
def test_f1_workers_are_killed_again_and_again_under_load(row: Row) -> None:
    row.fault = "SIGKILL of the busier of two model workers, twice, three requests of each kind"
    with Rig(step_s=STEP_S, workers=2) as rig:
        asks = mixed(FULL, max_tokens=120)
        kill_under(rig, row, asks, rig.alone(asks), [100, 900])


# --- F2: one worker ---------------------------------------------------------------------------------------------------


def test_f2_the_only_worker_is_killed_and_its_requests_go_on_when_it_is_back(
    rig: Rig, row: Row, short_references: dict[str, Record]
) -> None:
    row.fault = "SIGKILL of the only model worker in mid-stream, all kinds of requests"
    kill_under(rig, row, mixed(SHORT), short_references, [80])


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_f2_the_only_worker_is_killed_at_random_moments(row: Row) -> None:
    row.fault = "SIGKILL of the only model worker at random moments, 3 times three requests of each kind"
    moments = random.Random(int(os.environ.get("FAULTS_SEED", "0")) or time.time_ns())
    with Rig(step_s=STEP_S) as rig:
        for turn in range(3):
            asks = mixed(FULL, max_tokens=120, first=turn * FULL)
            references = rig.alone(asks)
            total = sum(record.events for record in references.values())
            kill_under(rig, row, asks, references, [moments.randrange(1, total // 2)])


# --- F4: errors in a pass ---------------------------------------------------------------------------------------------


def test_f4_an_error_in_the_forward_pass_is_that_request_s_alone(
    rig: Rig, row: Row, short_references: dict[str, Record]
) -> None:
    row.fault = "an exception in the forward pass of 2 requests, streaming and not"
    before = rig.worker_pids()
    culprits = [faulty(RAISE), faulty(RAISE, stream=True)]
    records = rig.start([*mixed(SHORT), *culprits]).finish()
    failed = tally(row, records, short_references)
    assert [record.ask for record in failed] == culprits
    whole, streamed = failed
    assert whole.status == 500
    assert whole.headers["x-should-retry"] == "false"
    assert streamed.status == 200
    assert not streamed.done
    assert streamed.error
    assert {record.error["type"] for record in failed if record.error} == {"server_error"}
    assert rig.worker_pids() == before
    row.hit = f"{hits(rig.runtime_dir, RAISE)} passes failed, model worker the same"
    assert hits(rig.runtime_dir, RAISE)


@pytest.mark.parametrize("seed", [SEGV, STICKY], ids=["segv", "sticky"])
def test_f4_what_ends_the_process_is_survived_by_all(
    rig: Rig, row: Row, short_references: dict[str, Record], seed: int
) -> None:
    name = "SIGSEGV" if seed == SEGV else "a sticky device error"
    row.fault = f"{name} in the forward pass"
    die_under(rig, row, short_references, seed, name)


def die_under(rig: Rig, row: Row, references: dict[str, Record], seed: int, name: str) -> None:
    """Have a request end its worker's process, once; all others, and itself, go on elsewhere."""
    (before,) = rig.worker_pids()
    # What it gets without its fault: the same seed draws the same tokens in any process.
    records = rig.start([*mixed(SHORT), faulty(seed)]).finish()
    failed = tally(row, records, references)
    assert not failed, failed[0]
    rig.wait_workers()
    assert hits(rig.runtime_dir, seed) == 1
    assert before not in rig.worker_pids()
    row.replayed = SHORT + 1
    row.hit = f"the worker's process ended by {name}, another one runs"


# --- F7: memory -------------------------------------------------------------------------------------------------------


def test_f7_out_of_memory_by_one_request_fails_it_alone(
    rig: Rig, row: Row, short_references: dict[str, Record]
) -> None:
    row.fault = "out of memory in every pass that holds one of 2 requests; then in every pass of more than 12 tokens"
    before = rig.worker_pids()
    culprits = [faulty(MEMORY), faulty(MEMORY, stream=True)]
    records = rig.start([*mixed(SHORT), *culprits]).finish()
    # The one that does not stream is answered 503.
    failed = tally(row, records, short_references)
    whole, streamed = (record for record in records if record.ask in culprits)
    assert whole.status == 503
    assert int(whole.headers["retry-after"]) >= 1
    assert failed == [streamed]
    assert (row.errors, row.refused) == (1, 1)
    for record in (whole, streamed):
        assert record.error
        assert record.error["type"] == "service_unavailable_error"
    first = hits(rig.runtime_dir, MEMORY)
    assert first
    limit = rig.runtime_dir / "memory"
    limit.write_text("12")
    try:
        assert not tally(row, rig.start(mixed(SHORT)).finish(), short_references)
    finally:
        limit.unlink()
    assert row.errors + row.refused == 2
    second = hits(rig.runtime_dir, MEMORY) - first
    assert second
    assert rig.worker_pids() == before
    (worker,) = rig.pool_status().workers
    assert worker.stats is not None
    assert worker.stats.out_of_memory >= first + second
    row.hit = f"{first} and {second} passes without memory, counted by the worker, whose process is the same"


def test_f7_a_worker_killed_for_its_memory_is_replaced(rig: Rig, row: Row, short_references: dict[str, Record]) -> None:
    row.fault = "SIGKILL from inside the forward pass, as the kernel's OOM killer does it"
    die_under(rig, row, short_references, KILL, "SIGKILL")
    assert "out of memory?" in rig.log


def test_requests_that_ask_for_nothing_special_are_what_the_rows_are_about(rig: Rig) -> None:
    """The kinds are what their names say: their undisturbed answers end by a stop string, match, are called."""
    stopped = [rig.ask(ask_of("stop", n, stream=True)) for n in range(6)]
    assert {c.finish_reason for record in stopped for c in record.choices.values()} == {"stop", "length"}
    guided = [rig.ask(ask_of(kind, n, stream=True)) for kind in ("schema", "tools", "regex") for n in range(4)]
    choices = [choice for record in guided for choice in record.choices.values()]
    assert any(choice.reasoning for choice in choices)
    assert any(choice.text.startswith("{") and choice.finish_reason == "stop" for choice in choices)
    assert any(choice.calls and choice.finish_reason == "tool_calls" for choice in choices)
    assert len(rig.ask(ask_of("n=4", 1, stream=True)).choices) == 4
    assert len(rig.ask(ask_of("logprobs", 1, stream=True)).choices[0].logprobs) == 80
