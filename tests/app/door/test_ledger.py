"""Limits are those of all HTTP workers together, and outlive none of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.door.ledger import _COUNT, _OWNER, Ledger
from app.door.limits import duration
from config.keys import KeyLimits
from config.sources import ROOT
from tests.app.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger", clock)
    yield made
    made.close()


def worker(path: Path, script: str) -> subprocess.Popen[str]:
    """Another HTTP worker: a process with the ledger and a few lines to run."""
    start = (
        "import sys\nfrom pathlib import Path\nfrom app.door.ledger import Ledger\nfrom config.keys import KeyLimits\n"
        f"ledger = Ledger(Path({str(path)!r}))\nprint('up', flush=True)\nsys.stdin.readline()\n{script}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_the_file_is_private(ledger: Ledger, tmp_path: Path):
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o600


def test_open_requests_are_counted_until_they_leave(ledger: Ledger):
    limits = KeyLimits(concurrent=2)
    assert ledger.enter("alice", limits).refusal is None
    assert ledger.enter("alice", limits).refusal is None
    refused = ledger.enter("alice", limits)
    assert (refused.refusal, refused.retry_after) == ("concurrent requests", 1.0)
    assert ledger.enter("bob", limits).refusal is None
    ledger.leave("alice")
    assert ledger.enter("alice", limits).refusal is None


def test_a_count_that_went_wrong_is_counted_again(ledger: Ledger):
    limits = KeyLimits(concurrent=2)
    assert ledger.enter("alice", limits).refusal is None
    place = ledger._place("alice")
    whose, count, *rest = ledger._owner(place)
    _OWNER.pack_into(ledger._memory, place, whose, count + 1000, *rest)
    # Requests of a worker that nobody knows.
    _COUNT.pack_into(ledger._memory, ledger._count_at(place, 7), 1000)
    assert ledger.enter("alice", limits).refusal is None
    assert ledger.enter("alice", limits).refusal == "concurrent requests"


def test_requests_per_minute_come_back_evenly(ledger: Ledger, clock: Clock):
    limits = KeyLimits(requests_per_minute=6)
    left = [ledger.enter("alice", limits).requests_left for _ in range(6)]
    assert left == [5, 4, 3, 2, 1, 0]
    refused = ledger.enter("alice", limits)
    assert refused.refusal == "requests per minute"
    assert refused.retry_after == pytest.approx(10)
    clock.now += 10
    assert ledger.enter("alice", limits).refusal is None
    assert ledger.enter("alice", limits).refusal is not None
    clock.now += 3600
    assert ledger.enter("alice", limits).requests_left == 5


def test_tokens_are_taken_beforehand_and_given_back(ledger: Ledger, clock: Clock):
    limits = KeyLimits(tokens_per_minute=600)
    ledger.enter("alice", limits)
    assert ledger.book_tokens("alice", limits, 500, least=500).tokens_left == 100
    refused = ledger.book_tokens("alice", limits, 200, least=200)
    assert (refused.refusal, refused.retry_after) == ("tokens per minute", pytest.approx(10))
    assert ledger.book_tokens("alice", limits, -450).tokens_left == 550
    # What was used beyond is owed, and keeps the owner out until it is paid.
    assert ledger.book_tokens("alice", limits, 700).tokens_left == -150
    assert ledger.enter("alice", limits).refusal == "tokens per minute"
    clock.now += 16
    assert ledger.enter("alice", limits).refusal is None


def test_workers_together_admit_exactly_as_many_as_the_limits_say(tmp_path: Path):
    path = tmp_path / "ledger"
    script = (
        "minute = sum(ledger.enter('alice', KeyLimits(requests_per_minute=500)).refusal is None for _ in range(500))\n"
        "at_once = sum(ledger.enter('bob', KeyLimits(concurrent=77)).refusal is None for _ in range(100))\n"
        "print(minute, at_once, flush=True)\nsys.stdin.readline()"
    )
    workers = [worker(path, script) for _ in range(3)]
    for each in workers:
        assert each.stdout.readline() == "up\n"
    for each in workers:
        each.stdin.write("\n")
        each.stdin.flush()
    counts = [[int(number) for number in each.stdout.readline().split()] for each in workers]
    for each in workers:
        each.communicate("\n", timeout=30)
    minute, at_once = (sum(column) for column in zip(*counts, strict=True))
    assert at_once == 77
    # The bucket fills by 8.3 in a second while they are at it.
    assert 500 <= minute <= 500 + 8.4 * 60


def test_what_a_killed_worker_had_open_counts_no_longer(tmp_path: Path):
    path = tmp_path / "ledger"
    limits = KeyLimits(concurrent=3)
    script = (
        "print([ledger.enter('alice', KeyLimits(concurrent=3)).refusal for _ in range(3)], flush=True)\n"
        "sys.stdin.readline()"
    )
    ledger = Ledger(path)
    process = worker(path, script)
    assert process.stdout.readline() == "up\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "[None, None, None]\n"
    assert ledger.enter("alice", limits).refusal == "concurrent requests"
    process.kill()
    # Dead, but not yet collected by its parent, as it may be under gunicorn.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert [ledger.enter("alice", limits).refusal for _ in range(4)] == [None, None, None, "concurrent requests"]
    process.communicate()
    ledger.close()


def test_a_worker_that_is_stopped_with_the_lock_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    process = worker(
        path,
        "import fcntl\nfcntl.flock(ledger._descriptor, fcntl.LOCK_EX)\n"
        "print('has it', flush=True)\nsys.stdin.readline()",
    )
    assert process.stdout.readline() == "up\n"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "has it\n"
    process.send_signal(signal.SIGSTOP)
    assert ledger.enter("alice", KeyLimits(concurrent=1)).refusal is None
    assert "lock is not to be had" in caplog.text
    process.kill()
    process.communicate()
    ledger.close()


def test_the_next_service_starts_without_the_open_requests_of_the_last(tmp_path: Path):
    limits = KeyLimits(concurrent=1)
    first = Ledger(tmp_path / "ledger")
    assert first.enter("alice", limits).refusal is None
    first.close()
    second = Ledger(tmp_path / "ledger")
    assert second.enter("alice", limits).refusal is None
    second.close()


def test_a_damaged_file_is_made_anew(tmp_path: Path):
    (tmp_path / "ledger").write_bytes(b"x" * 100)
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.enter("alice", KeyLimits(concurrent=1)).refusal is None
    ledger.close()


def test_more_owners_than_places_take_those_of_who_was_idle_for_longest(ledger: Ledger, clock: Clock):
    busy, idle = KeyLimits(concurrent=1), KeyLimits(requests_per_minute=2)
    assert ledger.enter("busy", busy).refusal is None
    for number in range(1100):
        clock.now += 0.001
        assert ledger.enter(f"owner-{number}", idle).refusal is None
        ledger.leave(f"owner-{number}")
    assert ledger.enter("busy", busy).refusal == "concurrent requests"


def test_an_address_that_tries_keys_is_blocked_and_no_other(ledger: Ledger, clock: Clock):
    assert [ledger.bad_key("192.0.2.1", 3) for _ in range(3)] == [False, False, True]
    assert ledger.blocked("192.0.2.1", 3) == pytest.approx(20)
    assert ledger.blocked("192.0.2.2", 3) == 0
    clock.now += 20
    assert ledger.blocked("192.0.2.1", 3) == 0
    # Nobody can make the table grow.
    for number in range(10_000):
        ledger.bad_key(f"198.51.{number // 256}.{number % 256}", 3)
    assert ledger.blocked("203.0.113.9", 3) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (6.2, "7s"), (59.5, "1m0s"), (360, "6m0s"), (3600, "1h0m0s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str):
    assert duration(seconds) == text
