"""Who speaks for the whole service to systemd: the arbiter, which is its main process, from its own loop.

Ready means that a token can be produced and that somebody would hand it to a client. That the watchdog is kept quiet
means that this loop turns, that the pool says that its loop turns, and that whatever has work to do gets on with it.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from config.notify import Notifier
from workers.pool.announcer import Announcer
from workers.pool.bulletin import Bulletin
from workers.pool.keeper import PoolKeeper


class Spokesman:
    """Listens in on gunicorn's arbiter ``server`` and tells systemd.

    ``launches``: whether the pool is the arbiter's own business; if not (a unit of its own), the service is ready when
    its HTTP workers are. ``patience_s`` as `Announcer` has it; ``stop_s``: what stopping takes beside the time that
    running requests get.
    """

    def __init__(
        self,
        server: Any,
        keeper: PoolKeeper,
        notifier: Notifier,
        *,
        launches: bool,
        patience_s: float,
        stop_s: float,
    ) -> None:
        self._server = server
        self._keeper = keeper
        self._notifier = notifier
        self._launches = launches
        self._stop_s = stop_s
        self._announcer = Announcer(notifier, patience_s=patience_s)
        self._old_age = 0
        self._stopping = False
        self._last_words = ""
        server.manage_workers = self._with_a_word(server.manage_workers)
        server.reap_workers = self._with_a_word(server.reap_workers)
        server.reload = self._reload(server.reload)
        server.stop = self._stop(server.stop)

    def hand_over(self, environ: dict[str, str], pid: int) -> None:
        """Prepare the environment of the arbiter's successor, which is going to be process ``pid``."""
        self._notifier.hand_over(environ, pid)

    def succeeded_by(self, pid: int) -> None:
        """The arbiter ends, and the process ``pid`` goes on."""
        self._announcer.succeeded_by(pid)

    def speak(self) -> None:
        """Say how things are; returns at once."""
        # Until the predecessor (USR2) has ended, that one is the main process.
        self._keeper.listens = not self._server.master_pid
        if not self._keeper.listens:
            return
        bulletin = self._keeper.bulletin()
        if self._stopping:
            # Now gunicorn's own clock runs: what does not end in time is killed.
            bulletin = Bulletin(self._last_words, moving=True)
        else:
            if not self._launches:
                bulletin = replace(bulletin, ready=True, moving=True)
            if not self._serves():
                bulletin = replace(bulletin, ready=False)
                if not bulletin.text.startswith(("loading", "starting")):
                    bulletin = replace(bulletin, text=f"starting HTTP workers; {bulletin.text}")
        self._announcer.tell(bulletin)

    def _serves(self) -> bool:
        """Whether an HTTP worker takes connections; after a reload, whether none does any more that knows the old
        settings only. A worker's heartbeat is a file's time, set to the monotonic clock; before the first, the date.
        """
        workers = list(self._server.WORKERS.values())
        if any(worker.age <= self._old_age for worker in workers):
            return False
        return any(worker.tmp.last_update() <= time.monotonic() for worker in workers)

    def _with_a_word(self, original: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            try:
                result = original()
            except BaseException as error:  # among them gunicorn's way of stopping itself
                if reason := getattr(error, "reason", None):
                    self._last_words = f"stopping: {reason}"
                raise
            # Not if it raised: so HTTP workers end, which are forked in there.
            self.speak()
            return result

        return call

    def _reload(self, original: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            before, self._old_age = self._old_age, self._server.worker_age
            self._announcer.reloading()
            original()
            if self._server.worker_age == self._old_age:
                self._old_age = before  # refused: nothing is new
            self.speak()

        return call

    def _stop(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(graceful: bool = True) -> None:
            self._stopping = True
            self._last_words = self._last_words or "stopping: running requests may finish"
            if not self._server.reexec_pid and not self._server.master_pid:
                self._announcer.stopping(self._server.cfg.graceful_timeout + self._stop_s, self._last_words)
            original(graceful)

        return call
