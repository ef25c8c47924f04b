"""The numbers of HTTP workers: each in a file that outlives its process, all of them together never twice."""

import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from app.metrics import definitions as of
from app.metrics.definitions import EDITION
from app.metrics.shared import absorb, read
from app.metrics.tally import BUCKET, INFINITY, SUM, Tally, decode, encode


class Other:
    """A process of its own that has counted so many and lives on. Forked, since it needs nothing but the tally."""

    def __init__(self, folder: Path, number: int) -> None:
        reads, writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                tally = Tally(folder)
                tally.add(of.SUCCESS, "stop", amount=float(number))
                tally.observe(of.GAP, [0.02] * number)
                tally.set(of.OPEN, 7)
                tally.flush()
                os.write(writes, b"counted")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(writes)
        assert os.read(reads, 7) == b"counted"
        os.close(reads)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def total(folder: Path) -> dict[tuple[str, ...], float]:
    return read(folder, "", {})


STOPS = ("request_success", "stop")
GAPS = (of.GAP.name, BUCKET, "0.025")


def test_counts_of_living_processes_are_added_up_and_gauges_too(tmp_path: Path):
    others = [Other(tmp_path, 3), Other(tmp_path, 4)]
    try:
        found = total(tmp_path)
    finally:
        for other in others:
            other.kill()
    assert (found[STOPS], found[GAPS], found[("open_requests",)]) == (7, 7, 14)


def test_what_a_killed_process_counted_stays_and_its_gauges_go(tmp_path: Path):
    Other(tmp_path, 3).kill()
    alive = Other(tmp_path, 4)
    try:
        for _ in range(3):
            found = total(tmp_path)
            assert (found[STOPS], found[GAPS], found[("open_requests",)]) == (7, 7, 7)
    finally:
        alive.kill()
    found = total(tmp_path)
    assert (found[STOPS], found[GAPS]) == (7, 7)
    assert ("open_requests",) not in found


def test_the_files_of_the_dead_become_one(tmp_path: Path):
    for number in range(1, 6):
        Other(tmp_path, number).kill()
    absorb(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "past.json"]
    assert total(tmp_path)[STOPS] == 15


def test_a_file_that_was_absorbed_but_not_removed_is_not_counted_twice(tmp_path: Path):
    Other(tmp_path, 5).kill()
    (file,) = tmp_path.glob("*.tally")
    left = file.read_bytes()
    absorb(tmp_path)
    assert not file.exists()
    # As if the process that absorbed it had been killed right before it removed it.
    file.write_bytes(left)
    assert total(tmp_path)[STOPS] == 5
    assert total(tmp_path)[STOPS] == 5


def test_somebody_who_is_stopped_while_absorbing_holds_up_no_reader(tmp_path: Path):
    Other(tmp_path, 5).kill()
    holding = "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.flock(f, fcntl.LOCK_EX)"
    script = f"{holding}; print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        assert total(tmp_path)[STOPS] == 5
        assert len(list(tmp_path.glob("*.tally"))) == 1
    finally:
        holder.kill()
        holder.communicate()


def test_numbers_of_another_edition_are_not_mixed_with_ours(tmp_path: Path):
    Other(tmp_path, 5).kill()
    (file,) = tmp_path.glob("*.tally")
    file.rename(tmp_path / file.name.replace(EDITION, "0" * 12))
    assert total(tmp_path) == {}
    assert list(tmp_path.glob("*.tally")) == []


def test_a_past_that_cannot_be_read_is_none(tmp_path: Path):
    (tmp_path / "past.json").write_bytes(b"{")
    Other(tmp_path, 5).kill()
    assert total(tmp_path)[STOPS] == 5


def test_without_a_folder_it_counts_in_memory_and_writes_later(tmp_path: Path):
    folder = tmp_path / "no" / "folder"
    tally = Tally(folder)
    tally.add(of.EMBEDDED)
    tally.flush()
    assert tally.numbers == {("embedding_requests",): 1}
    folder.parent.mkdir()
    tally.flush()
    assert total(folder) == {("embedding_requests",): 1}
    tally.close()


def test_a_full_disk_loses_nothing_that_fits_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tally = Tally(tmp_path)
    tally.add(of.EMBEDDED)
    tally.flush()
    real = os.pwrite

    def full(file: int, data: bytes, place: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    tally.add(of.EMBEDDED)
    tally.add(of.SUCCESS, "stop")
    tally.flush()
    monkeypatch.setattr(os, "pwrite", real)
    assert total(tmp_path) == {("embedding_requests",): 1}
    tally.flush()
    assert total(tmp_path) == {("embedding_requests",): 2, STOPS: 1}
    tally.close()


def test_a_record_that_is_being_written_ends_a_file(tmp_path: Path):
    whole = encode(("a", "b"), 1.5) + encode(("c",), 2.5)
    assert decode(whole) == {("a", "b"): 1.5, ("c",): 2.5}
    for end in range(len(whole)):
        assert decode(whole[:end]).items() <= decode(whole).items()


@given(some.lists(some.floats(0, 200), max_size=200))
def test_values_are_counted_in_bulk_as_one_by_one(values: list[float]):
    tally = Tally(Path("/nonexistent"))
    for first in range(0, len(values), 7):
        tally.observe(of.GAP, values[first : first + 7])
    bounds = [*map(repr, of.GAP.bounds), INFINITY]
    expected = [0] * len(bounds)
    for value in values:
        expected[bisect_left(of.GAP.bounds, value)] += 1
    assert [tally.numbers.get((of.GAP.name, BUCKET, bound), 0) for bound in bounds] == expected
    assert tally.numbers.get((of.GAP.name, SUM), 0) == pytest.approx(sum(values), abs=1e-4)


@given(some.lists(some.floats(0, 1e6), min_size=1, max_size=20), some.randoms())
def test_sums_are_the_same_in_any_order(values: list[float], shuffled: Random):
    total: list[float] = []
    for _ in range(2):
        parts = []
        for value in values:
            tally = Tally(Path("/nonexistent"))
            tally.observe(of.GAP, [value])
            parts.append(tally.numbers[(of.GAP.name, SUM)])
        shuffled.shuffle(parts)
        total.append(sum(parts))
    assert total[0] == total[1]
