"""gunicorn's arbiter, steered: the pool in its loop, reloads that hold nobody up, a stop that its workers know of.

gunicorn has no setting for the arbiter's class, so the first hook (``on_starting``) makes the running one an arbiter of
ours. Only public methods are overridden, each around the stock one.

The stock arbiter waits inside a reload until the old workers have gone, up to the whole graceful timeout; meanwhile it
takes no signal, replaces no dead worker and kills no hung one. And until they have gone, the old ones count as workers:
one of the new ones that dies is not replaced. Here the old ones step aside: they are told to leave as soon as the new
ones serve, and are then looked after apart from them, as long as their last streams take.
"""

import contextlib
import logging
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from gunicorn.arbiter import Arbiter

log = logging.getLogger("tailrace.arbiter")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
# What a worker exits with that cannot start, once others could. The arbiter, which compares, sees 255.
_CANNOT_START = -1
# Before the next one is tried.
_START_PAUSE_S = 1.0
# One stop may come as several signals: from the platform, and passed on by who started us.
_SAME_STOP_S = 2.0


class SteeredArbiter(Arbiter):  # type: ignore[misc]
    """See the module's text. Made by `take_over`, never by a constructor."""

    _num_workers: int
    _tend: Callable[[], None]
    _may_reload: Callable[[], bool]
    _leaving: dict[int, Any]
    _stop_flag: mmap.mmap
    # Workers up to this age have the configuration of before the last reload.
    _outdated_age: int
    _spawn_at: float

    @classmethod
    def take_over(cls, server: Any, *, tend: Callable[[], None], may_reload: Callable[[], bool]) -> None:
        """Make ``server`` one of these.

        ``tend`` is called on each turn of its loop, at least once a second, until it stops; ``may_reload`` before each
        reload, which does not happen if it says no.
        """
        server.__class__ = cls
        server._tend, server._may_reload = tend, may_reload
        server._leaving, server._outdated_age, server._spawn_at = {}, 0, 0.0
        # Shared with every worker that is forked from here on.
        server._stop_flag = mmap.mmap(-1, 1)

    @property
    def stops(self) -> bool:
        """Whether the whole service is stopping; true in its HTTP workers too, at the same moment."""
        return bool(self._stop_flag[0])

    def manage_workers(self) -> None:
        """Fork workers that are missing, send away those that are too many, look after the pool."""
        if any(map(_serves, self.WORKERS.values())):
            # From here on a worker that cannot start is no reason to stop the others; gunicorn stops for these codes.
            self.WORKER_BOOT_ERROR = self.APP_LOAD_ERROR = _CANNOT_START
        self._send_away()
        wanted = self._num_workers
        if time.monotonic() < self._spawn_at:
            self._num_workers = len(self.WORKERS)
        else:
            # Old ones that still wait for the new ones to serve are no substitute for these.
            self._num_workers += sum(worker.age <= self._outdated_age for worker in self.WORKERS.values())
        try:
            super().manage_workers()
        finally:
            self._num_workers = wanted
        if not self.stops:
            self._tend()

    def reap_workers(self) -> None:
        """Collect workers that have ended."""
        for pid in list(self._leaving):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            worker = self._leaving.pop(pid)
            worker.tmp.close()
            self.cfg.child_exit(self, worker)
        starting = {pid for pid, worker in self.WORKERS.items() if not _serves(worker)}
        super().reap_workers()
        if starting - self.WORKERS.keys():
            self._spawn_at = time.monotonic() + _START_PAUSE_S

    def murder_workers(self) -> None:
        """Kill workers that are blocked, also among those that are leaving."""
        with self._everybody():
            super().murder_workers()

    def kill_workers(self, sig: int) -> None:
        """Send a signal to all workers."""
        with self._everybody():
            super().kill_workers(sig)

    def reload(self) -> None:
        """Read the configuration again and start new workers."""
        # gunicorn would leave a running service over a typo in a file, its workers orphaned.
        if not self._may_reload():
            return
        self._outdated_age = self.worker_age
        outdated = dict(self.WORKERS)
        self.WORKERS.clear()  # those that the stock method would wait for
        try:
            super().reload()
        finally:
            self.WORKERS.update(outdated)

    def spawn_worker(self) -> int:
        """Fork a worker."""
        # A signal that reaches a worker between its fork and its own handlers would go into its copy of the arbiter's
        # queue and be lost, and TERM would wait for the whole graceful timeout. `begin_worker` lifts this.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            pid: int = super().spawn_worker()
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)

    def begin_worker(self, worker: Any) -> None:
        """In a new worker: the signals' default until it sets its own, and what it must know of the service's stop."""
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        for other in self._leaving.values():
            other.tmp.close()
        worker.service_stops = lambda: self.stops
        worker.sockets_are_lent = self.systemd

    def stop(self, graceful: bool = True) -> None:
        """Stop all workers: graceful ones refuse what is new, and finish what they have."""
        self._stop_flag[0] = 1
        self.WORKERS.update(self._leaving)
        self._leaving.clear()
        begun = time.monotonic()

        def again(number: int, frame: Any) -> None:
            # The stock arbiter ignores a second TERM.
            if time.monotonic() - begun > _SAME_STOP_S:
                self.SIG_QUEUE.put_nowait(signal.SIGQUIT)

        signal.signal(signal.SIGTERM, again)
        super().stop(graceful)

    def _send_away(self) -> None:
        """Tell workers to leave that are too many, or outdated, these as soon as enough new ones serve, or if others
        serve and they do not yet: many reloads in a row would have more and more of them start.
        """
        by_age = sorted(self.WORKERS.values(), key=lambda worker: worker.age)
        old = [worker for worker in by_age if worker.age <= self._outdated_age]
        new = by_age[len(old) :]
        surplus = new[: max(0, len(new) - self._num_workers)]
        if len(new) >= self._num_workers and all(map(_serves, new)):
            surplus += old
        elif any(map(_serves, old)):
            surplus += [worker for worker in old if not _serves(worker)]
        for worker in surplus:
            self._leaving[worker.pid] = self.WORKERS.pop(worker.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def _everybody(self) -> Iterator[None]:
        """While it lasts, those that are leaving are workers again."""
        self.WORKERS.update(self._leaving)
        try:
            yield
        finally:
            for pid in list(self._leaving):
                if self.WORKERS.pop(pid, None) is None:
                    del self._leaving[pid]


def _serves(worker: Any) -> bool:
    """Whether it has begun to. Its heartbeat is a file's time, set to the monotonic clock; before that, the date."""
    began: bool = worker.tmp.last_update() <= time.monotonic()
    return began
