"""The arbiter's side: when it starts a pool, and when it does not."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from config import logs
from tests.workers.pool.harness import ROOT, alive, wait_until
from workers.pool.bulletin import Bulletin
from workers.pool.keeper import HANDOVER_VARIABLE, PoolGaveUp, PoolKeeper

LOG = logs.logger("test")


class FakePool:
    """A pool as the keeper sees it: the other end of the lifeline."""

    def __init__(self, lifeline: int) -> None:
        self.pid = 4711
        self.end = socket.socket(fileno=os.dup(lifeline))

    def die(self, words: bytes = b"") -> None:
        self.end.sendall(words)
        self.end.close()


class Bench:
    def __init__(self, directory, **options) -> None:
        self.now = 0.0
        self.pools: list[FakePool] = []
        self.keeper = PoolKeeper(
            directory / "pool.sock", LOG, start=self._start, clock=lambda: self.now, command=["pool"], **options
        )

    def _start(self, command, lifeline: int) -> FakePool:
        self.pools.append(FakePool(lifeline))
        return self.pools[-1]

    def pause_until_next(self) -> float:
        """Let time pass until another pool is started; return how long that took."""
        before, count = self.now, len(self.pools)
        while len(self.pools) == count:
            self.keeper.tend()
            if len(self.pools) == count:
                self.now += 0.5
        return self.now - before


def test_a_pool_is_started_once_if_none_listens(directory):
    bench = Bench(directory)
    for _ in range(5):
        bench.keeper.tend()
    assert len(bench.pools) == 1


def test_a_pool_that_listens_already_is_left_alone_and_replaced_only_when_it_is_gone(directory):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "pool.sock"))
    listener.listen()
    bench = Bench(directory)
    bench.keeper.tend()
    peer = listener.accept()[0]
    peer.sendall(b"status" * 1000)
    for _ in range(3):
        bench.keeper.tend()
    assert bench.pools == []
    peer.close()
    listener.close()
    bench.keeper.tend()
    assert len(bench.pools) == 1


def test_without_launch_it_never_starts_one(directory):
    bench = Bench(directory, launch=False)
    for _ in range(3):
        bench.keeper.tend()
    assert bench.pools == []


def test_a_dead_pool_comes_back_at_once_and_then_with_growing_pauses(directory):
    bench = Bench(directory)
    bench.keeper.tend()
    pauses = []
    for _ in range(8):
        bench.pools[-1].die()
        pauses.append(bench.pause_until_next())
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60]
    bench.now += 61
    bench.pools[-1].die()
    assert bench.pause_until_next() == 0


@pytest.mark.parametrize("code", [1, 2])
def test_last_words_of_a_pool_that_gave_up_are_passed_on_even_in_pieces(directory, code):
    bench = Bench(directory)
    bench.keeper.tend()
    bench.pools[0].end.sendall(b"FATAL %d no su" % code)
    bench.keeper.tend()
    bench.pools[0].die(b"ch file\n")
    with pytest.raises(PoolGaveUp, match=r"^no such file$") as gave_up:
        bench.keeper.tend()
    assert gave_up.value.code == code


def test_a_forked_http_worker_lets_go_of_the_lifeline(directory):
    bench = Bench(directory)
    bench.keeper.tend()
    bench.keeper.abandon()
    assert bench.pools[0].end.recv(1) == b""
    bench.keeper.tend()
    assert len(bench.pools) == 1


def test_a_pool_that_does_not_stop_is_killed_after_the_deadline(directory):
    stubborn = "import sys, time; print('up', flush=True); time.sleep(60)"
    keeper = PoolKeeper(directory / "pool.sock", LOG, command=[sys.executable, "-c", stubborn])
    keeper.tend()
    pid = keeper.pid
    assert pid is not None
    keeper.stop(0.3)
    assert not alive(pid)
    assert keeper.pid is None


def test_the_pool_gets_its_lifeline_and_no_other_descriptor(directory):
    show = f"import os, sys; open({str(directory / 'fds')!r}, 'w').write(' '.join(os.listdir('/proc/self/fd')))"
    listening = socket.create_server(("127.0.0.1", 0))
    listening.set_inheritable(True)
    keeper = PoolKeeper(directory / "pool.sock", LOG, command=[sys.executable, "-c", show])
    keeper.tend()
    wait_until(lambda: (directory / "fds").exists() and (directory / "fds").read_text(), "the list")
    # 0, 1, 2, the lifeline, and what listing and writing themselves have open.
    assert str(listening.fileno()) not in (directory / "fds").read_text().split()[3:]
    assert len((directory / "fds").read_text().split()) <= 6
    keeper.stop(5)
    listening.close()


def test_the_successor_of_an_arbiter_takes_over_the_pool(directory, monkeypatch):
    first = Bench(directory)
    first.keeper.tend()
    environ: dict[str, str] = {}
    first.keeper.hand_over(environ)
    descriptor, pid = environ[HANDOVER_VARIABLE].split(",")
    assert os.get_inheritable(int(descriptor))
    # An executed successor has the descriptor under the same number; here it gets a copy.
    monkeypatch.setenv(HANDOVER_VARIABLE, f"{os.dup(int(descriptor))},{pid}")
    second = Bench(directory)
    assert HANDOVER_VARIABLE not in os.environ
    first.keeper.abandon()
    second.keeper.tend()
    assert second.pools == []
    assert second.keeper.pid == 4711
    first.pools[0].die()
    second.pause_until_next()


def test_the_keeper_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import workers.pool.keeper;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names"
        " and m.split('.')[0] not in ('config', 'workers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pool_starts_with_signals_held_back_and_the_arbiter_goes_on_without(directory):
    target = str(directory / "mask")
    show = f"import signal; open({target!r}, 'w').write(str(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    keeper = PoolKeeper(directory / "pool.sock", LOG, command=[sys.executable, "-c", show])
    keeper.tend()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    wait_until(lambda: (directory / "mask").exists() and (directory / "mask").read_text(), "the mask")
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        assert name in (directory / "mask").read_text()
    keeper.stop(5)


def test_a_pool_that_has_fallen_silent_is_a_standstill_and_then_killed(directory, monkeypatch):
    killed = []
    monkeypatch.setattr("workers.pool.keeper.os.kill", lambda pid, number: killed.append((pid, number)))
    bench = Bench(directory)
    bench.keeper.tend()
    assert bench.keeper.bulletin().text == "starting the pool"
    said = Bulletin("ready: 1 worker", ready=True)
    bench.pools[0].end.sendall(said.line())
    bench.keeper.tend()
    assert bench.keeper.bulletin() == said
    while not killed:
        bench.now += 1.0
        bench.keeper.tend()
        assert bench.now <= bench.keeper.silent_s + 1
        assert bench.keeper.bulletin().moving == (bench.now <= bench.keeper.stale_s) or killed
    assert (killed, bench.now) == ([(4711, signal.SIGKILL)], bench.keeper.silent_s + 1)
    bench.pools[0].die()
    bench.keeper.tend()
    assert len(bench.pools) == 2


def test_silence_while_the_arbiter_itself_was_stopped_proves_nothing(directory, monkeypatch):
    monkeypatch.setattr("workers.pool.keeper.os.kill", lambda pid, number: pytest.fail("killed"))
    bench = Bench(directory)
    bench.keeper.tend()
    bench.pools[0].end.sendall(Bulletin("ready", ready=True).line())
    bench.keeper.tend()
    bench.now += 3600.0
    bench.keeper.tend()
    assert bench.keeper.bulletin().moving


def test_a_successor_hears_nothing_of_the_pool_while_its_predecessor_lives_but_sees_its_end(directory):
    bench = Bench(directory)
    bench.keeper.tend()
    bench.keeper.listens = False
    bench.pools[0].end.sendall(Bulletin("ready", ready=True).line())
    bench.keeper.tend()
    assert not bench.keeper.bulletin().ready
    bench.keeper.listens = True
    bench.keeper.tend()
    assert bench.keeper.bulletin().ready
    bench.keeper.listens = False
    bench.pools[0].die(b"unheard")
    bench.keeper.tend()
    assert len(bench.pools) == 2


def test_a_pool_that_never_says_a_word_is_killed(directory, monkeypatch):
    killed = []
    monkeypatch.setattr("workers.pool.keeper.os.kill", lambda pid, number: killed.append((pid, number)))
    bench = Bench(directory)
    bench.now = 1000.0
    while not killed:
        bench.now += 1.0
        bench.keeper.tend()
        assert bench.now <= 1002.0 + bench.keeper.first_word_s
    assert killed == [(4711, signal.SIGKILL)]
    assert bench.now > 1001.0 + bench.keeper.first_word_s


def test_a_successor_that_has_waited_long_for_its_predecessors_end_kills_nobody(directory, monkeypatch):
    monkeypatch.setattr("workers.pool.keeper.os.kill", lambda pid, number: pytest.fail("killed"))
    bench = Bench(directory)
    bench.keeper.tend()
    bench.keeper.listens = False
    for _ in range(2 * int(bench.keeper.first_word_s)):
        bench.now += 1.0
        bench.keeper.tend()
    bench.keeper.listens = True
    bench.now += 1.0
    bench.keeper.tend()
