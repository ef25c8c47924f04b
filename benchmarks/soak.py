"""Half an hour of everything at once, and what the processes hold meanwhile. Run as ``make soak [MINUTES=30]``.

The real service with the embedded model, at normal settings but for a short queue and a small cache, which is full
soon. Its clients stream, wait, ask wrongly, set themselves short times and vanish; now and then the model worker is
killed. Every few seconds memory (private pages: what ends with the process), open files and threads of each process are
taken. Written to ``benchmarks/results``: ``soak.png`` with the curves, ``soak.md`` with the figures. Exit status 1 if
something grew, or a request failed without a reason.

Growth is judged where nothing else happens: from the middle on, when no worker is killed any more, by the slope of a
straight line. A failure is explained if it comes within `EXPLAINED_S` of a kill.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.processes import Process, running
from benchmarks.soak_clients import Client, Tally
from config.sources import ROOT

START_S = 180.0
# A worker that was killed is back, and its requests are answered, within so many seconds.
EXPLAINED_S = 60.0
# What a process may gain in the judged part: a share of what it has, or so many bytes, files, threads.
PRIVATE_SHARE, PRIVATE_BYTES, FILES, THREADS = 0.03, 6 * 2**20, 8.0, 4.0
SETTLE_S = 30.0


@dataclass
class Series:
    """What the processes of one role hold together, at moments in seconds since the start.

    ``own``: bytes that each shares with nobody.
    """

    at: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    count: list[int] = field(default_factory=list)


@dataclass
class Soak:
    """One run. ``kills``: when a model worker was killed, seconds since the start."""

    minutes: float
    clients: int
    kills: list[float] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    judged: tuple[float, float] = (0.0, 0.0)
    unexplained: list[str] = field(default_factory=list)
    explained: Counter[str] = field(default_factory=Counter)
    growth: list[str] = field(default_factory=list)
    files_left: dict[str, tuple[float, float]] = field(default_factory=dict)
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")


def roles(process: Process) -> dict[str, list[psutil.Process]]:
    """Return the processes of the service by what they do."""
    found: dict[str, list[psutil.Process]] = {}
    tree = process.tree()
    for each in tree:
        with suppress(psutil.Error):
            command = " ".join(each.cmdline())
            if each.pid == process.root.pid:
                role = "arbiter"
            elif "model worker" in command or "workers.entry" in command or "spawn_main" in command:
                role = "model worker"
            elif "pool" in command or "-m workers" in command:
                role = "pool"
            elif each.ppid() == process.root.pid:
                role = "HTTP workers"
            else:
                role = "others"
            found.setdefault(role, []).append(each)
    return found


def sample(soak: Soak, process: Process, since: float) -> None:
    """Take down what the processes hold now."""
    now = time.monotonic() - since
    for role, processes in roles(process).items():
        own = files = threads = 0.0
        count = 0
        for each in processes:
            with suppress(psutil.Error, OSError):
                lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                # Shared pages would count for more when another program that has them, too, comes to its end.
                own += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
                files, threads = files + each.num_fds(), threads + each.num_threads()
                count += 1
        series = soak.series.setdefault(role, Series())
        for values, value in (
            (series.at, now),
            (series.own, own),
            (series.files, files),
            (series.threads, threads),
        ):
            values.append(value)
        series.count.append(count)


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the straight line of least squares, in units for each second; 0 for fewer than two points."""
    if len(at) < 2:
        return 0.0
    mean_at, mean = sum(at) / len(at), sum(values) / len(values)
    spread = sum((x - mean_at) ** 2 for x in at)
    return sum((x - mean_at) * (y - mean) for x, y in zip(at, values, strict=True)) / spread if spread else 0.0


def judge(soak: Soak) -> None:
    """Find growth in the judged part, and failures without a reason."""
    first, last = soak.judged
    for role, series in soak.series.items():
        chosen = [place for place, at in enumerate(series.at) if first <= at <= last]
        at = [series.at[place] for place in chosen]
        for name, values, most in (
            ("own memory", series.own, None),
            ("open files", series.files, FILES),
            ("threads", series.threads, THREADS),
        ):
            part = [values[place] for place in chosen]
            if len(part) < 4 or role == "others":
                continue
            gained = slope(at, part) * (last - first)
            limit = max(PRIVATE_BYTES, PRIVATE_SHARE * part[0]) if most is None else most
            if gained > limit:
                shown = f"{gained / 2**20:.1f} MB" if most is None else f"{gained:.1f}"
                soak.growth.append(f"{role}: {name} grew by {shown} in {(last - first) / 60:.0f} minutes")


def explain(soak: Soak, began: float) -> None:
    """Tell the failures that a kill explains from the others."""
    for moment, text in soak.tally.surprises:
        at = moment - began
        if any(kill - 1 <= at <= kill + EXPLAINED_S for kill in soak.kills):
            soak.explained[text.split(":")[0]] += 1
        else:
            soak.unexplained.append(f"{at:.0f} s, {text}")


def soak_for(minutes: float, clients: int, every_s: float) -> Soak:
    """Run it."""
    soak = Soak(minutes, clients)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="tailrace-soak-") as home:
        environment = {
            "TAILRACE_CONFIG": os.devnull,
            "TAILRACE_RUNTIME_DIR": f"{home}/run",
            "TAILRACE_STATE_DIR": f"{home}/state",
            "TAILRACE_PORT": str(port),
            "TAILRACE_ONLY_CPU": "1",
            "TAILRACE_MAX_BATCH": "8",
            "TAILRACE_MAX_QUEUE": "8",
            "TAILRACE_KV_CACHE_GIB": "0.25",
            "TAILRACE_LOG_LEVEL": "warning",
        }
        with running([sys.executable, "-m", "app"], environment, port) as process:
            process.wait_ready("/readyz", START_S)
            _run(soak, process, port, every_s)
    judge(soak)
    return soak


def _run(soak: Soak, process: Process, port: int, every_s: float) -> None:
    over = threading.Event()
    crowd = [Client(port, soak.tally, over, seed) for seed in range(soak.clients)]
    # What is opened once, the store above all, is there from now on.
    crowd[0].warm_up()
    before = {role: sum(each.num_fds() for each in found) for role, found in roles(process).items()}
    began = time.monotonic()
    seconds = soak.minutes * 60
    soak.judged = (seconds / 2, seconds * 0.95)
    # All in the first half, but for one at the very end.
    due = [seconds * share for share in (0.1, 0.2, 0.3, 0.4, 0.96)]
    for client in crowd:
        client.start()
    while (now := time.monotonic() - began) < seconds:
        sample(soak, process, began)
        if due and now >= due[0]:
            due.pop(0)
            for worker in roles(process).get("model worker", ()):
                os.kill(worker.pid, signal.SIGKILL)
            soak.kills.append(now)
        time.sleep(min(every_s, max(0.0, seconds - now)))
    over.set()
    for client in crowd:
        client.join(180)
    deadline = time.monotonic() + SETTLE_S
    # What clients held is given back as soon as they are gone.
    while True:
        after = {role: sum(each.num_fds() for each in found) for role, found in roles(process).items()}
        if all(after.get(role, 0) <= files + 4 for role, files in before.items()) or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    soak.files_left = {role: (before[role], after.get(role, 0)) for role in before}
    for role, (files, left) in soak.files_left.items():
        if left > files + 4:
            soak.growth.append(f"{role}: {left:.0f} open files without clients, {files:.0f} before")
    explain(soak, began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return 1 if something grew or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    # Matplotlib is there for benchmarks only, and the tests use the rest.
    from benchmarks import soak_report

    soak = soak_for(given.minutes, given.clients, given.every)
    given.out.mkdir(parents=True, exist_ok=True)
    soak_report.write(soak, given.out)
    print((given.out / "soak.md").read_text(encoding="utf-8"))
    return 1 if soak.growth or soak.unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
