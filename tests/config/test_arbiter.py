"""Which workers the arbiter sends away; what it does with real ones is tested in tests/faults."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from config import arbiter
from config.arbiter import SteeredArbiter


class Bench:
    """An arbiter whose workers are no processes, and the pids that got a signal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
        self.told: list[int] = []
        monkeypatch.setattr(arbiter, "os", SimpleNamespace(kill=lambda pid, _: self.told.append(pid)))
        self.server: Any = SteeredArbiter.__new__(SteeredArbiter)
        self.server._leaving, self.server._outdated_age, self.server._num_workers = {}, 0, wanted
        self.server.WORKERS = {}
        self.age = 0

    def spawn(self, count: int) -> None:
        for _ in range(count):
            self.age += 1
            tmp = SimpleNamespace(last_update=time.time)
            self.server.WORKERS[self.age] = SimpleNamespace(age=self.age, pid=self.age, tmp=tmp)

    def serve(self, *pids: int) -> None:
        for pid in pids:
            self.server.WORKERS[pid].tmp.last_update = lambda: 0.0

    def reload(self) -> None:
        self.server._outdated_age = self.age
        self.spawn(self.server._num_workers)
        self.server._send_away()


def test_however_many_reloads_come_before_new_workers_serve_only_the_last_ones_start(monkeypatch):
    bench = Bench(monkeypatch, wanted=2)
    bench.spawn(2)
    bench.serve(1, 2)
    for _ in range(10):
        bench.reload()
        assert set(bench.server.WORKERS) == {1, 2, bench.age - 1, bench.age}
    bench.serve(bench.age)
    bench.server._send_away()
    assert {1, 2} <= set(bench.server.WORKERS)
    bench.serve(bench.age - 1)
    bench.server._send_away()
    assert set(bench.server.WORKERS) == {bench.age - 1, bench.age}
    assert sorted(bench.told) == list(range(1, bench.age - 1))


def test_a_reload_before_any_worker_serves_sends_none_away(monkeypatch):
    bench = Bench(monkeypatch, wanted=2)
    bench.spawn(2)
    bench.reload()
    assert not bench.told
