"""The battery's rows L4, L5, L6: clients that read slowly, send slowly, say nothing, or vanish.

The short forms are for two cores that others use too: they judge what became of each connection strictly, and times
only against times of the same minute.
"""

import json
import random
import resource
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from tests.battery import nginx
from tests.e2e.server import free_port, wait_until
from tests.faults.load_clients import ask, ask_all, chat, connect, leave, quantile, request_bytes, run
from tests.faults.rig import Rig
from tests.faults.table import Row
from tests.faults.test_l_load import count, story

MEGABYTE = 2**20


def http_workers(rig: Rig) -> list[psutil.Process]:
    """The arbiter's children, less the pool."""
    children = psutil.Process(rig.process.pid).children()
    return [child for child in children if "pool" not in " ".join(child.cmdline())]


def files_of(processes: Sequence[psutil.Process]) -> int:
    """Open files of all of them."""
    return sum(each.num_fds() for each in processes)


def memory_of(processes: Sequence[psutil.Process]) -> float:
    """Their memory in bytes; what they share counts once (PSS)."""
    return float(sum(each.memory_full_info().pss for each in processes))


# --- L4


def slow_readers(row: Row, monkeypatch: pytest.MonkeyPatch, readers: int, send_timeout_s: float) -> None:
    """Half of the readers take a byte a second, half nothing at all, of streams of four choices each."""
    monkeypatch.setenv("STEPS_PER_SECOND", "50")
    row.fault = (
        f"{readers} readers of a byte now and then or none, four choices each, beside 4 good ones; dropped after "
    )
    row.fault += f"{send_timeout_s:g} s"
    endless = {"ignore_eos": True, "stream": True}
    good = [chat("Go on.", max_tokens=60, **endless) for _ in range(4)]
    with Rig(engine="benchmarks.scripted:run", send_timeout_s=send_timeout_s, max_batch=1024) as rig:
        workers = http_workers(rig)
        normal = run(ask_all(rig.port, good))
        before = memory_of(workers)
        began = time.monotonic()
        slow = []
        for _ in range(readers):
            connection = connect(rig.port, receive_buffer=4096)
            connection.sendall(request_bytes(chat("Go on.", n=4, max_tokens=100_000, **endless)))
            slow.append(connection)
        wait_until(lambda: rig.pool_status().running == readers, "the slow readers", 60)
        most = 0.0
        beside = []

        while rig.pool_status().running > 0:
            beside += run(ask_all(rig.port, good))
            most = max(most, memory_of(workers))
            for connection in slow[::2]:
                # A byte in some seconds: a write is never done, though never quite stuck.
                connection.setblocking(False)
                with suppress(BlockingIOError, ConnectionError):
                    connection.recv(1)
            assert time.monotonic() < began + 60 + 10 * send_timeout_s, "slow readers are still there"
        dropped_s = time.monotonic() - began
        endings = [_ending(connection) for connection in slow]
        after = run(ask_all(rig.port, good))
    assert not any(b"[DONE]" in each for each in endings), "a cut stream looks complete"
    count(row, [*normal, *beside, *after])
    row.requests += readers
    row.errors += readers
    calm, disturbed = (quantile([gap for each in group for gap in each.gaps()], 0.99) for group in (normal, beside))
    assert disturbed < 5 * calm + 0.5, (calm, disturbed)
    grown = (most - before) / MEGABYTE
    assert grown < 1.5 * readers + 30, f"{grown:.0f} MB more for {readers} readers"
    row.hit = f"all {readers} were cut without [DONE], the last after {dropped_s:.0f} s"
    row.notes.append(
        f"token gaps of the good ones, p99: {1000 * calm:.0f} ms without, {1000 * disturbed:.0f} ms with them; the "
        f"HTTP workers grew by {grown:.0f} MB at most; the cut ones count as errors"
    )


def _ending(connection: socket.socket) -> bytes:
    """What is left to read of a connection that must have ended."""
    connection.settimeout(30)
    received = b""
    try:
        while data := connection.recv(65536):
            received = (received + data)[-1000:]
    except ConnectionError:
        pass
    connection.close()
    return received


def test_l4_readers_that_do_not_read_are_cut_and_disturb_nobody(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_readers(row, monkeypatch, readers=16, send_timeout_s=2)


@pytest.mark.nightly
def test_l4_two_hundred_readers_that_do_not_read(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_readers(row, monkeypatch, readers=200, send_timeout_s=60)


# --- L5


class Drip:
    """Connections that send a byte each now and then, on a thread; notes when the server ends one, and what it says."""

    def __init__(self, port: int, idle: int, headers: int, bodies: int) -> None:
        self.idle = [connect(port) for _ in range(idle)]
        self.headers = [connect(port) for _ in range(headers)]
        self.bodies = [connect(port) for _ in range(bodies)]
        for connection in self.idle:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        for connection in self.idle:
            assert b" 200 " in connection.recv(4096)
        whole = request_bytes(chat("Hello, world!" * 20))
        self.began = time.monotonic()
        self.ends: dict[socket.socket, tuple[float, bytes]] = {}
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * 400
        self._parts = dict.fromkeys(self.headers, head)
        self._parts |= dict.fromkeys(self.bodies, whole)
        self._at = dict.fromkeys(self._parts, 0)
        for connection in self.bodies:
            place = whole.index(b"\r\n\r\n") + 4
            connection.sendall(whole[:place])
            self._at[connection] = place
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._parts:
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ)
            while not self._over.wait(0.2) and len(self.ends) < len(self._parts):
                for key, _ in selector.select(0):
                    ended: Any = key.fileobj
                    said = b""
                    with suppress(OSError):
                        said = ended.recv(4096)
                    self.ends[ended] = (time.monotonic() - self.began, said)
                    selector.unregister(ended)
                for connection, whole in self._parts.items():
                    if connection not in self.ends:
                        place = self._at[connection]
                        try:
                            connection.send(whole[place : place + 1])
                        except OSError:
                            continue
                        self._at[connection] = place + 1
                        assert place < len(whole) - 1, "a slow request was sent to its end"

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        for connection in (*self.idle, *self._parts):
            connection.close()


def quiet_crowd(row: Row, idle: int, slow: int, receive_timeout_s: float, through_nginx: int) -> None:
    """Connections that say nothing or little, straight and through nginx, and a new request beside them."""
    row.fault = (
        f"{idle} idle kept-alive connections, {slow} slow headers and {slow} slow bodies (5 bytes/s, limit "
        f"{receive_timeout_s:g} s) at gunicorn; {through_nginx} idle ones at nginx"
    )
    with Rig(receive_timeout_s=receive_timeout_s, step_s=0.0) as rig, _nginx(rig.port, through_nginx) as front:
        ports = [rig.port] + ([front] if front else [])
        alone = {port: _times(port) for port in ports}
        drips = [Drip(rig.port, idle, slow, slow)]
        if front:
            drips.append(Drip(front, through_nginx, 0, 0))
        files = max(each.num_fds() for each in http_workers(rig))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        beside = {port: _times(port) for port in ports}
        drip = drips[0]
        wait_until(lambda: len(drip.ends) == 2 * slow, "the end of the slow ones", receive_timeout_s + 60)
        after = run(ask(rig.port, story(1, max_tokens=4)))
        for each in drips:
            each.stop()
        wait_until(lambda: files_of(http_workers(rig)) < 100, "files that are closed again", 60)
    assert after.verdict == "complete"
    ends = [drip.ends[each] for each in drip.bodies]
    assert all(b" 408 " in said.split(b"\r\n")[0] for _, said in ends)
    assert all(json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] for _, said in ends)
    last = max(at for at, _ in drip.ends.values())
    assert last < receive_timeout_s + 30
    assert min(at for at, _ in ends) > 0.9 * receive_timeout_s
    assert files < 0.8 * limit
    requests = sum(len(times) for group in (alone, beside) for times in group.values()) + 1
    row.requests += requests + 2 * slow
    row.complete += requests
    row.refused += 2 * slow
    told = []
    for port in ports:
        calm, crowded = (quantile(group[port], 0.5) for group in (alone, beside))
        assert crowded < 3 * calm + 0.25, (calm, crowded)
        told.append(f"{'nginx' if port == front else 'gunicorn'} {1000 * calm:.0f} and {1000 * crowded:.0f} ms")
    row.hit = f"all {2 * slow} slow ones were ended by the server, bodies with 408, the last after {last:.1f} s"
    row.notes.append(
        f"answer to a new request, median, without and with them: {', '.join(told)}; {files} files at most"
    )


def _times(port: int) -> list[float]:
    seen = [run(ask(port, story(1, max_tokens=2))) for _ in range(10)]
    assert all(each.verdict == "complete" for each in seen), seen
    return [each.seconds_to_answer for each in seen]


@contextmanager
def _nginx(upstream: int, wanted: int) -> Iterator[int]:
    """The port of an nginx in front of ``upstream``; 0 if there is none here."""
    binary = nginx.program() if wanted else None
    if binary is None:
        yield 0
        return
    front = nginx.Nginx(binary, free_port(), upstream)
    try:
        yield front.port
    finally:
        front.stop()


def test_l5_who_sends_nothing_or_slowly_keeps_nobody_waiting(row: Row) -> None:
    quiet_crowd(row, idle=200, slow=40, receive_timeout_s=3, through_nginx=200)


@pytest.mark.nightly
def test_l5_thousands_that_send_nothing_or_slowly(row: Row) -> None:
    quiet_crowd(row, idle=1000, slow=900, receive_timeout_s=30, through_nginx=900)


# --- L6


def storm(row: Row, clients: int, at_once: int, seed: int) -> None:
    """Clients that leave at every stage, and what is left of them."""
    row.fault = (
        f"{clients} clients, {at_once} at a time, vanish while queued, in the prompt, in the stream or at its end"
    )
    stages = ("before the body", "at once", "queued", "in the stream", "at the end")
    left: dict[str, int] = dict.fromkeys(stages, 0)
    lock = threading.Lock()
    with Rig(max_batch=8, max_queue=10_000, step_s=0.004) as rig:
        settled = run(ask_all(rig.port, [story(place, max_tokens=8) for place in range(12)]))
        workers = http_workers(rig)
        arbiter = psutil.Process(rig.process.pid)
        processes = [arbiter, *arbiter.children(recursive=True)]
        wait_until(lambda: rig.pool_status().running == 0, "an idle model worker", 60)
        idle = rig.pool_status().workers[0]
        files, threads = files_of(processes), sum(each.num_threads() for each in workers)

        def client(number: int) -> None:
            dice = random.Random(seed * 100_000 + number)
            stage = dice.choice(stages)
            body = story(number, max_tokens=dice.randint(5, 60), stream=dice.random() < 0.6, n=dice.choice([1, 1, 3]))
            data = request_bytes(body)
            connection = connect(rig.port, timeout=20)
            try:
                connection.sendall(data[: len(data) - 20] if stage == "before the body" else data)
                if stage == "queued":
                    connection.settimeout(dice.uniform(0.01, 0.5))
                if stage in ("queued", "in the stream", "at the end"):
                    received = b""
                    mark = b"[DONE]" if stage == "at the end" and body["stream"] else b"content"
                    while mark not in received and (data := connection.recv(2048)):
                        received += data
            except (TimeoutError, ConnectionError):
                pass
            leave(connection, reset=dice.random() < 0.5)
            with lock:
                left[stage] += 1

        numbers = iter(range(clients))

        def runner() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                client(number)

        runners = [threading.Thread(target=runner) for _ in range(at_once)]
        for each in runners:
            each.start()
        most = 0
        while any(each.is_alive() for each in runners):
            status = rig.pool_status()
            most = max(most, status.running + status.queued)
            time.sleep(0.05)
        stopped = time.monotonic()

        def freed() -> bool:
            status = rig.pool_status()
            stats = status.workers[0].stats
            return stats is not None and (status.running, status.queued, stats.running, stats.waiting) == (0, 0, 0, 0)

        wait_until(freed, "free slots", 60)
        freed_s = time.monotonic() - stopped
        wait_until(lambda: files_of(processes) <= files + 6, "closed files", 60)
        after = rig.pool_status().workers[0]
        again = run(ask_all(rig.port, [story(place, max_tokens=8) for place in range(12)]))
        threads_left = sum(each.num_threads() for each in workers)
        same = (after.pid, http_workers(rig)) == (idle.pid, workers)
    assert same, "a process died"
    # A second and a step are the promise; a machine that is shared may make it late.
    assert freed_s < 1 + 10, freed_s
    assert all(left.values()), left
    assert [each.texts for each in again] == [each.texts for each in settled]
    assert after.stats is not None
    assert idle.stats is not None
    assert after.stats.blocks_used <= idle.stats.blocks_used
    # Native threads of gevent's pool, of which there are ten at most, come and stay.
    assert threads_left <= threads + 10 * len(workers)
    count(row, [*settled, *again])
    row.requests += clients
    row.errors += clients
    row.hit = ", ".join(f"{number} {stage}" for stage, number in left.items()) + f"; up to {most} in the pool at once"
    row.notes.append(
        f"all slots free {freed_s:.2f} s after the last had gone; cache blocks in use, open files and process ids as "
        "before; who left counts as an error"
    )


def test_l6_clients_that_vanish_at_every_stage_leave_nothing_behind(row: Row) -> None:
    storm(row, clients=150, at_once=24, seed=1)


@pytest.mark.nightly
def test_l6_thousands_of_clients_vanish(row: Row) -> None:
    storm(row, clients=20_000, at_once=48, seed=2)
