"""As many threads as the machine, the affinity mask and the quotas of all groups allow."""

import os
from pathlib import Path

import pytest

from workers.engine.processors import usable


@pytest.fixture(autouse=True)
def _sixty_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))


def groups(root: Path, **quotas: str) -> tuple[Path, Path]:
    """Files as the kernel shows them to a process in a.slice/b.service."""
    inner = root / "a.slice" / "b.service"
    inner.mkdir(parents=True)
    for name, quota in quotas.items():
        folder = {"outer": root, "slice": inner.parent, "own": inner}[name]
        (folder / "cpu.max").write_text(quota + "\n")
    own = root / "own"
    own.write_text("0::/a.slice/b.service\n")
    return root, own


def test_without_a_quota_all_processors_of_the_mask_count(tmp_path: Path) -> None:
    assert usable(*groups(tmp_path, slice="max 100000", own="max 100000")) == 64
    assert usable(tmp_path / "none", tmp_path / "none") == 64


@pytest.mark.parametrize("place", ["outer", "slice", "own"])
def test_a_quota_counts_wherever_it_is_set(tmp_path: Path, place: str) -> None:
    assert usable(*groups(tmp_path, **{place: "250000 100000"})) == 3


def test_the_smallest_quota_counts_and_one_processor_is_always_left(tmp_path: Path) -> None:
    assert usable(*groups(tmp_path, slice="400000 100000", own="50000 100000")) == 1


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    assert usable(*groups(tmp_path, own="nonsense")) == 64
    assert usable(tmp_path, tmp_path / "not there") == 64
