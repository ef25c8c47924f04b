"""What systemd is told, and when: by the arbiter, or by a pool that is a unit of its own."""

import time
from collections.abc import Callable

from config.notify import Notifier, microseconds
from workers.pool.bulletin import Bulletin

# Each word of progress before the service is ready buys it so many seconds more to start.
_START_EXTENSION_S = 60.0
_EXTEND_EACH_S = 5.0
# Twice in systemd's interval would do; but a word may find the socket full, and no word shall soon mean something.
_WORDS_IN_WATCHDOG = 4
_LONGEST_WATCHDOG_PAUSE_S = 2.0


class Announcer:
    """Turns bulletins into notifications; nothing is said twice but what has to be.

    ``patience_s``: how long bulletins may say that nothing moves while others are still at mending it (a hung model
    worker is ended by the pool's own watchdog). systemd's interval is lengthened to that if it is shorter.
    """

    def __init__(
        self, notifier: Notifier, *, patience_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notifier = notifier
        self._clock = clock
        self._ready = False
        self._reloading = False
        self._status = ""
        self._extend_at = 0.0
        self._watchdog_at = 0.0
        self._watchdog_s = notifier.watchdog_s
        self._lengthen = 0.0 < notifier.watchdog_s < patience_s
        if self._lengthen:
            self._watchdog_s = patience_s

    def tell(self, bulletin: Bulletin) -> None:
        """Pass on what ``bulletin`` says. To be called at least once a second; returns at once."""
        if not self._notifier.address:
            return
        now = self._clock()
        lines: list[str] = []
        if bulletin.text != self._status:
            lines.append(f"STATUS={bulletin.text}")
        becomes_ready = bulletin.ready and (not self._ready or self._reloading)
        if becomes_ready:
            lines.append("READY=1")
        extends = not self._ready and not bulletin.ready and bulletin.moving and now >= self._extend_at
        if extends:
            lines.append(f"EXTEND_TIMEOUT_USEC={microseconds(_START_EXTENSION_S)}")
        barks = self._watchdog_s > 0 and bulletin.moving and now >= self._watchdog_at
        if barks:
            lines += [f"WATCHDOG_USEC={microseconds(self._watchdog_s)}"] if self._lengthen else []
            lines.append("WATCHDOG=1")
        if not lines or not self._notifier.send(*lines):
            return
        self._status = bulletin.text
        if becomes_ready:
            self._ready, self._reloading = True, False
        if extends:
            self._extend_at = now + _EXTEND_EACH_S
        if barks:
            self._lengthen = False
            self._watchdog_at = now + min(self._watchdog_s / _WORDS_IN_WATCHDOG, _LONGEST_WATCHDOG_PAUSE_S)

    def reloading(self) -> None:
        """Say that the configuration is being read again; the next bulletin that is ready ends it."""
        if self._ready:
            self._status = "reloading"
            moment = microseconds(time.clock_gettime(time.CLOCK_MONOTONIC))
            self._reloading = self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={moment}", "STATUS=reloading")

    def stopping(self, seconds: float, text: str = "stopping: running requests may finish") -> None:
        """Say that the service stops, which may take ``seconds``."""
        self._status = text
        self._notifier.send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={microseconds(seconds)}", f"STATUS={text}")

    def succeeded_by(self, pid: int) -> None:
        """Say that another process is the main one from now on."""
        self._notifier.send(f"MAINPID={pid}")
