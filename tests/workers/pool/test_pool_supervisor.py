"""The supervisor with a clock and lives of the test's own: what it does when, without any process."""

from dataclasses import dataclass, field

import pytest

from workers.config import WorkerConfig
from workers.messages import Cancelled, Event, Fatal, Loading, Order, Output, PoolCounters, Ready, Report, Stats
from workers.pool.bulletin import LONGEST_SILENT_LOAD_S
from workers.pool.incarnation import Ended
from workers.pool.model_worker import Limits
from workers.pool.supervisor import Supervisor

STATS = Stats(steps=1, running=0, waiting=0, blocks_used=0, blocks_total=0)
LIMITS = Limits(watchdog_s=30, backoff_first_s=1, backoff_longest_s=60, breaker_deaths=3, stop_s=5, pause_s=50)


@dataclass
class FakeLife:
    """A process as the supervisor sees it."""

    pid: int = 7
    frames: list[list[Report]] = field(default_factory=list)
    orders: list[Order | None] = field(default_factory=list)
    cause: str | None = None
    ended: str | None = ""
    killed: bool = False
    closed: bool = False
    survives_kill: bool = False

    def fileno(self) -> int:
        return -1

    def send(self, order: Order) -> None:
        self.orders.append(order)

    def read(self):
        frames, self.frames = self.frames, []
        yield from frames
        if self.ended != "":
            raise Ended(self.ended)

    def ask_to_stop(self) -> None:
        self.orders.append(None)

    def kill(self) -> None:
        self.killed = True
        if not self.survives_kill:
            self.cause = self.cause or "was killed by SIGKILL"

    def exit_cause(self) -> str | None:
        return self.cause

    def close(self) -> None:
        self.closed = True


class Bench:
    """A supervisor, and levers for all that surrounds it."""

    def __init__(self, count: int = 1) -> None:
        self.now = 1000.0
        self.busy = False
        self.lives: list[FakeLife] = []
        self.events: list[Event] = []
        self.lost = 0
        self.counts = PoolCounters()
        self.watched = 0
        self.supervisor = Supervisor(
            [WorkerConfig(index=index, base_model="m", runtime_dir="r", cache_dir="c") for index in range(count)],
            limits=LIMITS,
            events=lambda worker, events: self.events.extend(events),
            lost=lambda worker: setattr(self, "lost", self.lost + 1),
            busy=lambda worker: self.busy,
            watch=lambda worker: setattr(self, "watched", self.watched + 1),
            unwatch=lambda worker: setattr(self, "watched", self.watched - 1),
            start_life=self._start,
            counts=self.counts,
            clock=lambda: self.now,
        )
        self.worker = self.supervisor.workers[0]
        self.supervisor.tend()

    def _start(self, config: WorkerConfig) -> FakeLife:
        self.lives.append(FakeLife(pid=len(self.lives) + 1))
        return self.lives[-1]

    @property
    def life(self) -> FakeLife:
        return self.lives[-1]

    def report(self, *reports: Report) -> None:
        self.life.frames.append(list(reports))
        self.supervisor.read(self.worker)

    def ready(self) -> None:
        self.report(Loading(progress=0.5, stage="x"), Ready(card_path="/card"))

    def die(self) -> None:
        self.life.cause, self.life.ended = "exited with code 1", None
        self.supervisor.read(self.worker)

    def pass_time(self, seconds: float, *, step: float = 1.0) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + step)
            self.supervisor.tend()


def test_states_follow_what_the_worker_reports():
    bench = Bench()
    assert bench.worker.state == "starting"
    bench.report(Loading(progress=0.25, stage="reading"))
    assert (bench.worker.state, bench.worker.progress, bench.worker.stage) == ("loading", 0.25, "reading")
    bench.ready()
    assert bench.worker.state == "ready"
    assert bench.supervisor.can_answer
    assert bench.supervisor.card_path == "/card"


def test_pauses_between_starts_double_up_to_a_minute():
    bench = Bench()
    pauses = []
    for _ in range(9):
        before = bench.now
        bench.die()
        starts = len(bench.lives)
        while len(bench.lives) == starts:
            bench.pass_time(0.5, step=0.5)
        pauses.append(bench.now - before)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("proof", ["an answer", "a long life"])
def test_a_worker_that_has_proved_itself_starts_again_without_growing_pauses(proof):
    bench = Bench()
    for _ in range(4):
        bench.ready()
        if proof == "an answer":
            bench.report(Output(id="a", ids=[1]))
        else:
            bench.pass_time(61)
        bench.die()
        assert bench.worker.deaths_in_a_row == 1
        bench.pass_time(1.5)
        assert bench.worker.life is not None


def test_the_breaker_opens_after_deaths_in_a_row_and_closes_when_the_worker_is_ready():
    bench = Bench()
    bench.ready()
    for _ in range(3):
        assert not bench.supervisor.hopeless
        bench.die()
        bench.pass_time(10)
    assert bench.supervisor.hopeless
    assert bench.supervisor.failure is None  # it was ready once, so the model can be served
    bench.ready()
    assert not bench.supervisor.hopeless


def test_a_model_that_never_loads_is_a_failure():
    bench = Bench()
    for _ in range(3):
        assert bench.supervisor.failure is None
        bench.die()
        failure = bench.supervisor.failure
        bench.pass_time(10)
    assert failure == "exited with code 1"
    assert not bench.supervisor.failed_for_good


def test_fatal_is_never_started_again_and_a_failure_only_if_it_is_true_of_all():
    bench = Bench(count=2)
    bench.worker.life, other = bench.lives[0], bench.supervisor.workers[1]
    bench.lives[0].frames.append([Fatal(message="no such file")])
    bench.supervisor.read(bench.worker)
    assert bench.worker.state == "failed"
    assert bench.supervisor.failure is None
    bench.lives[0].cause, bench.lives[0].ended = "exited with code 0", None
    bench.supervisor.read(bench.worker)
    bench.pass_time(120)
    assert len(bench.lives) == 2
    bench.lives[1].frames.append([Fatal(message="no such file either")])
    bench.supervisor.read(other)
    assert bench.supervisor.failure == "no such file"
    assert bench.supervisor.failed_for_good


def test_fatal_after_the_model_was_served_is_a_death_like_others():
    bench = Bench()
    bench.ready()
    bench.die()
    for _ in range(LIMITS.breaker_deaths - 1):
        assert not bench.supervisor.hopeless
        bench.pass_time(120)
        bench.report(Fatal(message="no such file"))
        assert bench.life.killed
        assert bench.life.closed
    assert bench.worker.last_end == "cannot serve the model again: no such file"
    assert bench.supervisor.hopeless
    assert bench.supervisor.failure is None
    bench.pass_time(120)
    bench.ready()
    assert not bench.supervisor.hopeless


def test_a_busy_silent_worker_is_hung_then_killed_then_replaced():
    bench = Bench()
    bench.ready()
    bench.busy = True
    bench.pass_time(9)
    assert bench.worker.state == "ready"
    bench.pass_time(3)
    assert bench.worker.state == "hung"
    assert not bench.supervisor.can_answer
    bench.pass_time(20)
    assert bench.lives[0].killed
    assert bench.lost == 1
    assert bench.lives[0].closed
    bench.pass_time(1)
    assert len(bench.lives) == 2


def test_silence_without_work_proves_nothing_and_counts_from_the_first_job():
    bench = Bench()
    bench.ready()
    bench.pass_time(300)
    assert bench.worker.state == "ready"
    bench.busy = True
    bench.pass_time(9)
    assert bench.worker.state == "ready"


def test_signs_of_life_keep_a_slow_worker():
    bench = Bench()
    bench.ready()
    bench.busy = True
    for _ in range(20):
        bench.pass_time(9)
        bench.report(STATS)
    assert bench.worker.state == "ready"


def test_frames_without_a_step_are_no_sign_of_life():
    bench = Bench()
    bench.ready()
    bench.busy = True
    bench.report(Stats(steps=5, running=2, waiting=0, blocks_used=1, blocks_total=9))
    for _ in range(12):
        bench.pass_time(1)
        bench.report(Stats(steps=5, running=2, waiting=0, blocks_used=1, blocks_total=9))
    assert bench.worker.state == "hung"
    assert bench.supervisor.statuses(lambda worker: 2)[0].idle_s == 12
    for _ in range(20):
        bench.pass_time(1)
        bench.report(Stats(steps=5, running=2, waiting=0, blocks_used=1, blocks_total=9))
    assert bench.lives[0].killed
    assert (bench.counts.hangs, bench.counts.worker_deaths) == (1, 1)


@pytest.mark.parametrize("progress", ["steps", "events", "nothing to do", "cancelled"])
def test_steps_words_about_jobs_and_an_idle_loop_show_progress(progress):
    bench = Bench()
    bench.ready()
    bench.busy = True
    for number in range(20):
        bench.pass_time(8)
        steps = number if progress == "steps" else 5
        running = 0 if progress == "nothing to do" else 1
        bench.report(Stats(steps=steps, running=running, waiting=0, blocks_used=1, blocks_total=9))
        if progress == "events":
            bench.report(Output(id="a", ids=[number]))
        if progress == "cancelled":
            bench.report(Cancelled(id=""))
    assert bench.worker.state == "ready"
    assert len(bench.lives) == 1


def test_work_that_is_withdrawn_from_a_worker_that_stands_still_does_not_hide_that_it_does():
    bench = Bench()
    bench.ready()
    bench.busy = True
    bench.pass_time(2)
    bench.busy = False  # the client has left; the worker does not say that it has heard of it
    bench.pass_time(10)
    assert bench.worker.state == "hung"
    bench.pass_time(21)
    assert bench.lives[0].killed


def test_how_the_last_life_ended_is_told_of_the_next():
    bench = Bench()
    assert bench.supervisor.statuses(lambda worker: 0)[0].cause == ""
    bench.die()
    bench.pass_time(3)
    bench.ready()
    assert bench.worker.state == "ready"
    assert bench.supervisor.statuses(lambda worker: 0)[0].cause == "exited with code 1"


def test_pauses_grow_to_a_minute_while_nothing_is_answered_and_shrink_after_an_answer():
    bench = Bench()
    pauses = []
    for _ in range(9):
        bench.die()
        assert bench.worker.start_at is not None
        pauses.append(bench.worker.start_at - bench.now)
        bench.pass_time(pauses[-1] + 1)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    bench.ready()
    bench.report(Output(id="a", ids=[1]))
    bench.die()
    assert bench.worker.start_at == bench.now + 1


def test_ends_that_were_asked_for_are_no_deaths():
    bench = Bench()
    bench.ready()
    bench.supervisor.stop()
    bench.die()
    assert bench.counts.worker_deaths == 0


def test_a_pool_that_was_not_run_itself_does_not_blame_its_workers():
    bench = Bench()
    bench.ready()
    bench.busy = True
    bench.pass_time(3600, step=3600)
    assert bench.worker.state == "ready"


def test_the_next_life_waits_for_the_end_of_the_last():
    bench = Bench()
    bench.ready()
    bench.life.survives_kill, bench.life.ended = True, "sent garbage"
    bench.supervisor.read(bench.worker)
    bench.pass_time(30)
    assert (len(bench.lives), bench.lost, bench.worker.state) == (1, 1, "dead")
    bench.life.cause = "was killed by SIGKILL"
    bench.supervisor.reap()
    bench.pass_time(2)
    assert len(bench.lives) == 2


def test_last_words_are_read_before_an_exit_counts():
    bench = Bench()
    bench.ready()
    bench.life.frames.append([Output(id="a", ids=[1], finish_reason="stop")])
    bench.life.cause = "exited with code 1"
    bench.supervisor.reap()
    assert len(bench.events) == 1
    assert bench.lost == 1


def test_stop_asks_who_is_ready_kills_who_loads_and_later_who_does_not_return():
    loading, ready = Bench(), Bench()
    loading.report(Loading(progress=0.1, stage="x"))
    loading.supervisor.stop()
    assert loading.life.killed
    ready.ready()
    ready.supervisor.stop()
    assert ready.life.orders == [None]
    ready.pass_time(4)
    assert not ready.life.killed
    ready.pass_time(2)
    assert ready.life.killed
    ready.supervisor.reap()
    assert ready.supervisor.stopped
    ready.pass_time(120)
    assert len(ready.lives) == 1


def test_every_life_is_watched_once_and_let_go_before_it_is_closed():
    bench = Bench()
    for _ in range(3):
        assert bench.watched == 1
        bench.die()
        assert bench.watched == 0
        bench.pass_time(10)


def test_a_process_that_cannot_be_started_is_tried_again():
    bench = Bench()
    start = bench.supervisor._start_life

    def refuse(config):
        raise OSError(12, "Cannot allocate memory")

    bench.supervisor._start_life = refuse
    bench.die()
    bench.pass_time(2)
    assert bench.worker.state == "dead"
    bench.supervisor._start_life = start
    bench.pass_time(10)
    assert bench.worker.life is not None


@pytest.mark.parametrize("said", [[], [Loading(progress=0.5, stage="x")]])
def test_a_worker_that_gives_no_sign_while_it_loads_is_replaced(said):
    bench = Bench()
    first = bench.life
    for _ in range(2):  # as long as there are signs it may take its time
        bench.pass_time(LONGEST_SILENT_LOAD_S - 1)
        bench.report(Loading(progress=0.1, stage="x"))
    bench.report(*said)
    bench.pass_time(LONGEST_SILENT_LOAD_S)
    assert not first.killed
    bench.pass_time(1)
    assert first.killed
    assert "while it was loading" in bench.worker.last_end
    bench.pass_time(10)
    assert bench.life is not first


def test_a_pause_of_the_pool_itself_is_no_silence_of_a_worker_that_loads():
    bench = Bench()
    bench.now += 10 * LONGEST_SILENT_LOAD_S
    bench.supervisor.tend()
    bench.pass_time(LONGEST_SILENT_LOAD_S)
    assert not bench.life.killed
