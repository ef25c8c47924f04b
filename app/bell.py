"""How the greenlet of a request waits for its next token."""

import math
import time
from typing import Any

import gevent
from gevent.hub import Waiter


class Bell:
    """Wakes the one greenlet that waits for it; for that one what `gevent.event.Event` is for many, at less cost.

    Waiting is done for every token, and the timeout is hardly ever over. So the timer is not set anew for each wait: it
    goes on, and if it turns out to have rung too early it is set for the rest.
    """

    __slots__ = ("_hub", "_timer", "_timer_at", "_waiter", "_wake_at")

    def __init__(self) -> None:
        self._hub = gevent.get_hub()
        self._waiter: Any = None
        self._timer: Any = None
        # When the timer rings, and when the waiting greenlet wants to be woken: `time.monotonic`.
        self._timer_at = math.inf
        self._wake_at = math.inf

    def wait(self, timeout: float | None = None) -> None:
        """Return after the next `ring`, or after ``timeout`` seconds."""
        if timeout is None:
            self._wake_at = math.inf
        else:
            self._wake_at = time.monotonic() + timeout
            if self._wake_at < self._timer_at:
                self._set_timer(timeout)
        self._waiter = waiter = Waiter(self._hub)
        try:
            waiter.get()
        finally:
            self._waiter = None

    def ring(self) -> None:
        """Wake whoever waits, in the next turn of the hub's loop. Never switches; without anybody it does nothing."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            self._hub.loop.run_callback(waiter.switch, None)

    def close(self) -> None:
        """Stop the timer."""
        self._timer_at = math.inf
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _set_timer(self, seconds: float) -> None:
        self.close()
        self._timer_at = time.monotonic() + seconds
        self._timer = self._hub.loop.timer(seconds)
        self._timer.start(self._look)

    def _look(self) -> None:
        """The timer has rung."""
        self._timer_at = math.inf
        left = self._wake_at - time.monotonic()
        if left <= 0:
            self.ring()
        elif self._waiter is not None and left < math.inf:
            self._set_timer(left)
