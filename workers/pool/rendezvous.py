"""Where HTTP workers find the pool: a Unix socket at a fixed path, owned by at most one pool at a time."""

import fcntl
import os
import socket
from pathlib import Path

from config import logs

log = logs.logger("tailrace.pool")

_BACKLOG = 128


class Taken(Exception):
    """Another pool already serves this runtime directory."""


class Rendezvous:
    """The listening socket. A path, not an inherited pipe: either side may be restarted and is found again.

    A lock beside the socket, which the kernel lets go of when its holder dies, tells a dead pool's socket from a
    living one's. Raises `Taken` if it is held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise Taken(f"another pool already serves {path.parent}") from error
        self.listener = self._listen()

    def fileno(self) -> int:
        """The listening socket, for a selector."""
        return self.listener.fileno()

    def accept(self) -> socket.socket | None:
        """Return the next connection, or None if there is none after all. Raises OSError without free descriptors."""
        try:
            return self.listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None

    @property
    def lost(self) -> bool:
        """Whether the path no longer leads here: somebody tidied up the directory."""
        try:
            found = self.path.stat()
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._identity

    def renew(self) -> None:
        """Listen at the path again. Open connections stay. Raises OSError, and nothing has changed."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        old, self.listener = self.listener, self._listen()
        old.close()

    def close(self) -> None:
        """Stop listening, remove the path, let go of the lock."""
        self.listener.close()
        if not self.lost:
            self.path.unlink(missing_ok=True)
        os.close(self._lock)

    def _listen(self) -> socket.socket:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        old_mask = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        finally:
            os.umask(old_mask)
        found = self.path.stat()
        self._identity = (found.st_dev, found.st_ino)
        listener.listen(_BACKLOG)
        return listener
