"""What is said of the pool, and when, without a process."""

from config.notify import Notifier
from workers.messages import PoolStatus, WorkerStatus
from workers.pool.announcer import Announcer
from workers.pool.bulletin import LONGEST_SILENT_LOAD_S, Bulletin


def status(*workers: WorkerStatus, running: int = 0, queued: int = 0) -> PoolStatus:
    ready = any(worker.state == "ready" for worker in workers)
    return PoolStatus(
        ready=ready, draining=False, queued=queued, running=running, card_path=None, workers=list(workers)
    )


def worker(index: int, state: str, **more: object) -> WorkerStatus:
    return WorkerStatus(index=index, device="cpu", pid=1, state=state, **more)  # type: ignore[arg-type]


class Socket(Notifier):
    """Keeps what is sent; ``full``: has no room."""

    def __init__(self, watchdog_s: float) -> None:
        super().__init__("/somewhere", watchdog_s)
        object.__setattr__(self, "sent", [])
        object.__setattr__(self, "full", False)

    def send(self, *lines: str) -> bool:
        if not self.full:  # type: ignore[attr-defined]
            self.sent.append(lines)  # type: ignore[attr-defined]
        return not self.full  # type: ignore[attr-defined]


def test_the_text_counts_what_serves_and_names_who_does_not():
    told = Bulletin.of(
        status(worker(0, "ready"), worker(1, "dead", cause="was killed by SIGKILL"), running=3, queued=2)
    )
    assert told.text == "ready: 1 worker, 3 running, 2 waiting; worker 1 died: was killed by SIGKILL, respawning"
    assert (told.ready, told.moving) == (True, True)


def test_the_worker_that_is_furthest_is_the_one_waited_for():
    told = Bulletin.of(status(worker(0, "loading", progress=0.1), worker(1, "loading", progress=0.43, stage="reading")))
    assert told == Bulletin("loading the model: 43 %, reading")


def test_only_what_nobody_else_makes_good_is_a_standstill():
    hung, slow = worker(0, "hung"), worker(0, "loading", idle_s=LONGEST_SILENT_LOAD_S + 1)
    assert not Bulletin.of(status(hung)).moving
    assert not Bulletin.of(status(slow)).moving
    assert Bulletin.of(status(hung, worker(1, "ready"))).moving
    assert Bulletin.of(status(worker(0, "loading", idle_s=1.0))).moving
    assert Bulletin.of(status(worker(0, "dead"))).moving


def test_a_bulletin_survives_the_lifeline_and_garbage_is_none():
    told = Bulletin("läuft", ready=True, moving=False)
    assert Bulletin.parse(told.line().decode().rstrip("\n")) == told
    assert Bulletin.parse("STATE {") is None
    assert Bulletin.parse("STATE []") is None
    assert Bulletin.parse("FATAL x") is None


def test_ready_that_found_the_socket_full_is_said_again():
    manager = Socket(0.0)
    announcer = Announcer(manager, clock=lambda: 0.0)
    object.__setattr__(manager, "full", True)
    announcer.tell(Bulletin("ready", ready=True))
    object.__setattr__(manager, "full", False)
    announcer.tell(Bulletin("ready", ready=True))
    announcer.tell(Bulletin("ready", ready=True))
    assert manager.sent == [("STATUS=ready", "READY=1")]  # type: ignore[attr-defined]


def test_time_to_start_is_asked_for_and_the_watchdog_fed_only_while_something_moves():
    now = [0.0]
    manager = Socket(8.0)
    announcer = Announcer(manager, clock=lambda: now[0])
    for second in range(30):
        now[0] = float(second)
        announcer.tell(Bulletin("loading", moving=second < 15))
    said = [line.partition("=")[0] for lines in manager.sent for line in lines]  # type: ignore[attr-defined]
    assert said.count("EXTEND_TIMEOUT_USEC") == 3
    assert said.count("WATCHDOG") == 8
