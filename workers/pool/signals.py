"""Signals as something that a selector can wait for."""

import contextlib
import signal
import socket
from types import FrameType

NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)

# They tell the arbiter to upgrade or to reopen its logs, and reach the pool only when a whole group gets them.
IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


class SignalPipe:
    """Becomes readable when a signal of `NOTED` has arrived; the handlers do nothing but write it down."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._numbers: list[int] = []
        for end in (self._reader, self._writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for each in NOTED:
            signal.signal(each, self._note)
        for each in IGNORED:
            signal.signal(each, signal.SIG_IGN)
        # The keeper starts the pool with these held back, so that none can strike before this line.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*NOTED, *IGNORED})

    def fileno(self) -> int:
        """The reading end, for a selector."""
        return self._reader.fileno()

    def read(self) -> list[int]:
        """Return the signals that have arrived since the last time."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        numbers = []
        while self._numbers:
            numbers.append(self._numbers.pop(0))
        return numbers

    def close(self) -> None:
        """Give the descriptors back. The handlers stay: a late signal must not become a traceback."""
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._numbers.append(number)
