"""The small parts of the pool, each by itself."""

import contextlib
import io
import logging
import multiprocessing
import os
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from config.settings import Settings
from tests.workers.pool.harness import ROOT, job, wait_until
from workers import entry
from workers.entry import ReportPipe
from workers.messages import (
    Cancel,
    EmbedJob,
    Failed,
    GenerateJob,
    Output,
    PromptLogprobs,
    Report,
    Started,
    Stats,
    WorkerStatus,
)
from workers.pool import plan
from workers.pool.broker import Broker
from workers.pool.clients import Clients
from workers.pool.console import Console
from workers.pool.job_queue import JobQueue
from workers.pool.journal import Entry
from workers.pool.rendezvous import Rendezvous
from workers.wire import Decoder

STATS = Stats(steps=1, running=0, waiting=0, blocks_used=0, blocks_total=0)


# --- the queue to a worker --------------------------------------------------------------------------------------------


def test_a_queue_whose_reader_is_dead_takes_orders_without_blocking_and_its_thread_ends():
    orders = JobQueue(multiprocessing.get_context("spawn"))
    orders.child_has_it()  # and nobody else has it: as after the child's death
    before = threading.active_count()
    start = time.monotonic()
    for _ in range(20):
        orders.put(GenerateJob(id="x", prompt=list(range(100_000)), max_tokens=1))
    assert time.monotonic() - start < 10.0
    wait_until(lambda: threading.active_count() <= before, "the thread's end")
    orders.close()


def test_a_reader_that_stands_still_never_blocks_the_pool():
    orders = JobQueue(multiprocessing.get_context("spawn"))
    start = time.monotonic()
    for _ in range(20):
        orders.put(GenerateJob(id="x", prompt=list(range(100_000)), max_tokens=1))
    assert time.monotonic() - start < 10.0
    orders.child_has_it()
    orders.close()


# --- the pipe from a worker -------------------------------------------------------------------------------------------


def test_reports_arrive_whole_and_in_order_though_the_reader_is_slow():
    reader, writer = os.pipe()
    pipe = ReportPipe(writer)
    count = 20_000
    for number in range(count):
        start = time.monotonic()
        pipe.emit([Output(id="x" * 100, ids=[number]), STATS])
        assert time.monotonic() - start < 10.0
    decoder: Decoder[list[Report]] = Decoder(list[Report])
    seen: list[int] = []
    while len(seen) < count:
        for reports in decoder.feed(os.read(reader, 1 << 20)):
            seen += [number for report in reports if isinstance(report, Output) for number in report.ids]
    assert seen == list(range(count))
    pipe.flush(1)
    os.close(reader)


def test_a_pool_that_does_not_read_for_ever_ends_the_worker(monkeypatch):
    ended = []

    def leave(code):
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(entry.os, "_exit", leave)
    _, writer = os.pipe()
    pipe = ReportPipe(writer, max_pending=100_000)
    with pytest.raises(SystemExit):
        for _ in range(10_000):
            pipe.emit([Output(id="x" * 1000)])
    assert ended == [entry.EXIT_UNHEARD]


# --- journal and broker -----------------------------------------------------------------------------------------------


class FakeClient:
    def __init__(self) -> None:
        self.jobs: dict[str, Entry] = {}
        self.events: list[object] = []
        self.post = self.events.append


class FakeWorker:
    def __init__(self, index: int) -> None:
        self.index = index
        self.takes_jobs = True
        self.given_up = False


def make_broker(count: int = 1, **options):
    sent: list[tuple[int, object]] = []
    settings: dict[str, Any] = {"hopeless": lambda: False, "max_batch": 4, "max_queue": 9, "max_replays": 1} | options
    workers = [FakeWorker(index) for index in range(count)]
    broker = Broker(workers, send=lambda worker, order: sent.append((worker.index, order)), **settings)
    return broker, workers, sent


def test_a_replay_forces_what_was_delivered_and_leaves_out_what_the_client_cancelled():
    broker, workers, sent = make_broker(count=2)
    client, wanted = FakeClient(), job([1, 2], n=3)
    broker.submit(client, wanted)
    broker.take(workers[0], [Output(id=wanted.id, choice=0, ids=[5, 6])])
    broker.take(workers[0], [Output(id=wanted.id, choice=2, ids=[7], finish_reason="stop")])
    broker.cancel(client, Cancel(id=wanted.id, choice=1))
    sent.clear()
    workers[0].takes_jobs = False
    broker.worker_lost(workers[0])
    broker.dispatch()
    assert sent == [
        (1, GenerateJob(**{**as_dict(wanted), "emitted": [[5, 6], [], [7]]})),
        (1, Cancel(id=wanted.id, choice=1)),
    ]
    client.events.clear()
    broker.take(workers[1], [Output(id=wanted.id, choice=2, finish_reason="stop")])
    broker.take(workers[0], [Output(id=wanted.id, choice=0, ids=[66])])
    assert client.events == []
    broker.take(workers[1], [Output(id=wanted.id, choice=0, ids=[8], finish_reason="length")])
    assert len(client.events) == 1
    assert (broker.running, broker.queued, client.jobs) == (0, 0, {})


def as_dict(wanted: GenerateJob) -> dict[str, object]:
    return {name: getattr(wanted, name) for name in wanted.__struct_fields__}


def test_replayed_jobs_go_to_the_head_of_the_queue_in_their_order():
    broker, workers, sent = make_broker(max_batch=1)
    client = FakeClient()
    jobs = [job([number]) for number in range(6)]
    for each in jobs:
        broker.submit(client, each)
    sent.clear()
    broker.worker_lost(workers[0])
    broker.dispatch()
    assert [order.id for _, order in sent] == [each.id for each in jobs[:3]]


def started(sent: list[tuple[int, object]]) -> list[list[int]]:
    """The prompts of the jobs that went to workers, in order."""
    return [order.prompt for _, order in sent if isinstance(order, GenerateJob)]


def test_owners_take_turns_however_many_jobs_one_of_them_has():
    broker, workers, sent = make_broker(max_batch=1, max_queue=99)
    client = FakeClient()
    running = [job([number], salt="many") for number in range(3)]
    for each in (*running, *(job([number], salt="many") for number in range(3, 9))):
        broker.submit(client, each)
    for number, owner in ((20, "few"), (30, "one"), (21, "few")):
        broker.submit(client, job([number], salt=owner))
    for _ in range(9):
        ended = next(order for _, order in sent if order.id in client.jobs)
        broker.take(workers[0], [Output(id=ended.id, finish_reason="stop")])
        broker.dispatch()
    assert started(sent) == [[0], [1], [2], [3], [20], [30], [4], [21], [5], [6], [7], [8]]
    assert broker.queued == 0


def test_a_queue_that_one_owner_has_filled_keeps_no_other_out():
    broker, _, _ = make_broker(max_batch=1, max_queue=2)
    client = FakeClient()
    for number in range(6):
        broker.submit(client, job([number], salt="many"))
    assert [event.kind for event in client.events if isinstance(event, Failed)] == ["overloaded"]
    for owner in ("other", "other", "third"):
        broker.submit(client, job([9], salt=owner))
    assert [event.kind for event in client.events if isinstance(event, Failed)] == ["overloaded"] * 2
    assert broker.queued == 4


def test_jobs_that_are_given_up_leave_the_queue_wherever_they_stand():
    broker, workers, sent = make_broker(max_batch=1, max_queue=99)
    client = FakeClient()
    jobs = [job([number], salt=owner) for number, owner in enumerate("aaaababc")]
    for each in jobs:
        broker.submit(client, each)
    broker.worker_lost(workers[0])
    for gone in (jobs[1], jobs[4], jobs[7]):
        broker.cancel(client, Cancel(id=gone.id))
    assert broker.queued == 5
    sent.clear()
    while client.jobs:
        broker.dispatch()
        for each in [order for _, order in sent if order.id in client.jobs]:
            broker.take(workers[0], [Output(id=each.id, finish_reason="stop")])
    assert started(sent) == [[0], [2], [3], [6], [5]]
    assert broker.queued == 0


def test_the_place_of_a_finished_choice_is_free_for_others():
    broker, workers, sent = make_broker(max_batch=1)
    client, wide, next_one = FakeClient(), job([1], n=3), job([2])
    broker.submit(client, wide)
    broker.submit(client, next_one)
    assert broker.queued == 1
    broker.take(workers[0], [Output(id=wide.id, choice=0, finish_reason="stop")])
    broker.dispatch()
    assert broker.queued == 0
    assert sent[-1][1].id == next_one.id


def test_jobs_fail_as_unavailable_when_no_worker_is_worth_waiting_for():
    hopeless = []
    broker, workers, _ = make_broker(hopeless=lambda: bool(hopeless))
    client = FakeClient()
    broker.submit(client, job([1]))
    workers[0].takes_jobs = False
    hopeless.append(True)
    broker.worker_lost(workers[0])
    broker.dispatch()
    broker.submit(client, job([2]))
    assert [event.kind for event in client.events if isinstance(event, Failed)] == ["unavailable"] * 2
    assert broker.queued == 0


def test_an_embedding_is_asked_for_again_after_a_death():
    broker, workers, sent = make_broker()
    client = FakeClient()
    broker.submit(client, EmbedJob(id="e", prompt=[1]))
    broker.worker_lost(workers[0])
    broker.dispatch()
    assert [order.id for _, order in sent] == ["e", "e"]


def test_what_a_job_says_once_is_not_said_again_by_its_replay():
    broker, workers, _ = make_broker()
    client, wanted = FakeClient(), job([1])
    broker.submit(client, wanted)
    said = [Started(id=wanted.id), PromptLogprobs(id=wanted.id, logprobs=[])]
    for event in said:
        broker.take(workers[0], [event])
    broker.worker_lost(workers[0])
    broker.dispatch()
    for event in said:
        broker.take(workers[0], [event])
    assert client.events == said


def test_a_job_whose_wanted_choices_have_ended_is_cancelled_for_the_engine():
    broker, workers, sent = make_broker()
    client, wanted = FakeClient(), job([1], n=2)
    broker.submit(client, wanted)
    broker.cancel(client, Cancel(id=wanted.id, choice=0))
    broker.take(workers[0], [Output(id=wanted.id, choice=1, finish_reason="stop")])
    assert sent[-1] == (0, Cancel(id=wanted.id, confirm=True))
    assert broker.running == 0


def test_nonsense_choices_of_an_engine_are_ignored():
    broker, workers, _ = make_broker()
    client, wanted = FakeClient(), job([1])
    broker.submit(client, wanted)
    broker.take(workers[0], [Output(id=wanted.id, choice=1, ids=[1])])
    broker.take(workers[0], [Output(id=wanted.id, choice=-1, ids=[1])])
    broker.take(workers[0], [Output(id="unknown", ids=[1])])
    assert client.events == []


# --- plan -------------------------------------------------------------------------------------------------------------


def test_each_gpu_gets_a_worker_that_sees_only_that_one(tmp_path):
    settings = Settings(base_model="m", gpus=[2, 0], kv_cache_gib=1.5, runtime_dir=tmp_path, load_in_4bit=True)
    first, second = plan.worker_configs(settings)
    assert (first.index, first.visible_devices, first.device) == (0, "2", "cuda:0")
    assert (second.index, second.visible_devices, second.device) == (1, "0", "cuda:0")
    assert (first.kv_cache_bytes, first.quantization) == (3 * 2**29, "4bit")


def test_the_cpu_gets_one_worker_from_which_every_gpu_is_hidden(tmp_path):
    (config,) = plan.worker_configs(Settings(base_model="m", only_cpu=True, gpus=[0, 1], runtime_dir=tmp_path))
    assert (config.device, config.visible_devices) == ("cpu", "")


def test_the_bounds_of_the_settings_reach_the_pool():
    options = plan.pool_options(Settings(max_queue=7, max_replays=3, watchdog_s=11, graceful_timeout_s=9, max_batch=5))
    assert (options.max_queue, options.max_replays, options.max_batch) == (7, 3, 5)
    assert (options.limits.watchdog_s, options.drain_s) == (11, 9)
    options = plan.pool_options(Settings(max_queue_tokens=99, queue_timeout_s=4.5))
    assert (options.max_queue_tokens, options.queue_timeout_s) == (99, 4.5)


# --- console ----------------------------------------------------------------------------------------------------------


def status(state: str, progress: float) -> WorkerStatus:
    return WorkerStatus(index=0, device="cpu", pid=1, state=state, progress=progress, stage="reading")  # type: ignore[arg-type]


def test_a_terminal_shows_a_bar_and_then_the_address_with_a_command_to_try(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    threads = threading.active_count()
    console = Console("http://127.0.0.1:19327")
    console.show([status("loading", 0.25)])
    assert threading.active_count() == threads
    console.show([status("ready", 1.0)])
    console.ready()
    assert "worker 0 (cpu): reading" in screen.getvalue()
    assert "25%" in screen.getvalue()
    assert "curl http://127.0.0.1:19327/v1/chat/completions" in screen.getvalue()


def test_without_a_terminal_there_are_a_few_log_lines(caplog):
    caplog.set_level(logging.INFO, "tailrace.pool")
    console = Console("http://h:1", terminal=False)
    for percent in range(100):
        console.show([status("loading", percent / 100)])
    console.ready()
    assert 3 <= len(caplog.messages) <= 6
    assert caplog.messages[-1] == "ready"
    assert caplog.records[-1].__dict__["fields"] == {"url": "http://h:1"}


def test_a_terminal_that_is_gone_ends_the_drawing_and_nothing_else(monkeypatch):
    master, terminal = os.openpty()
    with open(terminal, "w") as screen:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", screen)
        console = Console("http://h:1")
        console.show([status("loading", 0.1)])
        os.close(master)
        console.show([status("loading", 0.2)])
        console.ready()
        console.close()
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            screen.close()


@pytest.mark.timeout(30)
def test_a_terminal_that_is_stopped_holds_nobody_up(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b" " * 65536)
    os.set_blocking(writing, True)
    with open(writing, "w") as screen:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", screen)
        console = Console("http://h:1", terminal=True)
        console.show([status("loading", 0.1)])
        console.ready()
        console.close()
        monkeypatch.undo()
        os.close(reading)


# --- where the pool is found ------------------------------------------------------------------------------------------


def test_a_pool_that_cannot_listen_again_goes_on_and_tries_later(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    selector = selectors.DefaultSelector()
    rendezvous = Rendezvous(place / "pool.sock")

    def nothing(*_: Any) -> None: ...

    clients = Clients(
        rendezvous, selector, most=9, max_pending=9, patience_s=9.0, greet=nothing, hear=nothing, gone=nothing
    )
    clients.open()
    shutil.rmtree(place)
    place.write_text("in the way")
    clients.tend(10.0)
    assert rendezvous.lost
    place.unlink()
    clients.tend(20.0)
    assert not rendezvous.lost
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(place / "pool.sock"))
        assert selector.select(5.0)
    clients.close()


def test_a_worker_that_cannot_read_its_orders_any_more_ends():
    script = (
        "import queue; from workers import entry; orders = queue.SimpleQueue(); orders.put(b'\\xc1');"
        "entry._read_jobs(orders, queue.SimpleQueue())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "orders cannot be read any more" in done.stderr + done.stdout
