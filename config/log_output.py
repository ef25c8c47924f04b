"""Where lines go: to standard error or to a file, with one call of the kernel each, and never at the service's cost."""

import logging
import os
import stat
import time
from pathlib import Path
from select import PIPE_BUF, POLLOUT, poll
from typing import Any

# As it was when the arbiter imported this, before gevent put its own in its place: waiting here must not let another
# greenlet log in between.
_poll = poll

# How long one line may wait for a reader that does not read (a terminal that was stopped, a pipe to a hung program).
# Once a line was lost, the next ones do not wait at all until one gets through.
_PATIENCE_MS = 50
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC

_lost_by_this_process = 0


def lost_lines() -> int:
    """Return how many lines this process could not write since it started."""
    return _lost_by_this_process


def _forget() -> None:
    global _lost_by_this_process
    _lost_by_this_process = 0


os.register_at_fork(after_in_child=_forget)


class LineHandler(logging.FileHandler):
    """Writes to the file at ``path``, or to standard error without one.

    A line that cannot be written (a full disk, a reader that hangs) is lost and counted; nobody waits for it and
    nothing is raised. The first line that gets through again is preceded by one that says how many were lost. A file
    that was moved away or deleted is opened anew for the next line, so every process follows a rotation by itself;
    gunicorn does it at once on USR1.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        logging.Handler.__init__(self)
        self._path = Path(path) if path else None
        # None for standard error: gunicorn opens anew what has a stream.
        self.stream: Any = None
        self._inode: tuple[int, int] | None = None
        self._lost = 0
        self._lost_in = 0
        self._lost_since = 0.0
        self._reason = ""
        # Half a line was written.
        self._torn = False
        if self._path is not None:
            self.stream = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line."""
        try:
            line = self.format(record)
            if self._lost and self._lost_in != os.getpid():
                self._lost = 0  # the parent's, before it forked
            if self._lost:
                line = f"{self.format(self._loss())}\n{line}"
            self._write(line.encode("utf-8", "backslashreplace") + b"\n")
        except Exception as error:
            self._lose(error)
        else:
            self._lost = 0

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the file; standard error stays open."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()
        logging.Handler.close(self)

    def _open(self) -> Any:
        """Open the file; None if that cannot be done now."""
        assert self._path is not None
        try:
            stream = os.fdopen(os.open(self._path, _APPEND, 0o640), "ab", buffering=0)
        except OSError:
            return None
        found = os.fstat(stream.fileno())
        self._inode = (found.st_dev, found.st_ino)
        return stream

    def _descriptor(self) -> int:
        if self._path is None:
            return 2
        try:
            found = self._path.stat()
            moved = (found.st_dev, found.st_ino) != self._inode
        except FileNotFoundError:
            moved = True
        if moved or self.stream is None:
            stream, self.stream = self.stream, None
            if stream is not None:
                stream.close()
            self.stream = self._open()
            self._torn = False
            if self.stream is None:
                raise FileNotFoundError(2, "the file cannot be opened")
        return int(self.stream.fileno())

    def _write(self, data: bytes) -> None:
        """Write all of ``data``. Raises OSError."""
        descriptor = self._descriptor()
        if self._torn:
            data = b"\n" + data
        # A pipe that has room has it for so much.
        most = PIPE_BUF if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else len(data)
        room = _poll()
        room.register(descriptor, POLLOUT)
        written = 0
        try:
            while written < len(data):
                if not room.poll(0 if self._lost else _PATIENCE_MS):
                    raise TimeoutError("nobody reads")
                written += os.write(descriptor, data[written : written + most])
        except OSError:
            self._torn = self._torn or written > 0
            raise
        self._torn = False

    def _lose(self, error: Exception) -> None:
        global _lost_by_this_process
        _lost_by_this_process += 1
        if not self._lost:
            self._lost_in, self._lost_since = os.getpid(), time.monotonic()
        self._lost += 1
        self._reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__

    def _loss(self) -> logging.LogRecord:
        record = logging.LogRecord("tailrace.log", logging.WARNING, "", 0, "log lines lost", None, None)
        seconds = time.monotonic() - self._lost_since
        record.__dict__["fields"] = {"lines": self._lost, "seconds": seconds, "reason": self._reason}
        return record
