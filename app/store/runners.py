"""Which processes still work on something: each holds a lock on a file of its own, which the kernel lets go with it."""

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

_PREFIX = "runner-"


class Runners:
    """The lock files in ``directory``. Used on the store's thread only; raises OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._own: tuple[str, int] | None = None

    def own(self) -> str:
        """Return this process's name among the runners, alive from now on."""
        if self._own is None or not self._path(self._own[0]).exists():
            self.close()
            self._own = self._begin()
        return self._own[0]

    def is_alive(self, name: str) -> bool:
        """Whether the process of this name still runs. The file of one that does not is removed."""
        if self._own is not None and self._own[0] == name:
            return True
        try:
            handle = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            self._path(name).unlink(missing_ok=True)
            return False
        finally:
            os.close(handle)

    def close(self) -> None:
        """This process works on nothing any more."""
        if self._own is not None:
            name, handle = self._own
            self._own = None
            with contextlib.suppress(OSError):
                self._path(name).unlink(missing_ok=True)
            os.close(handle)

    def _begin(self) -> tuple[str, int]:
        # Nobody asks for a name before a record has it, so nobody can take this lock before we do.
        name = f"{os.getpid()}-{secrets.token_hex(8)}"
        handle = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return name, handle

    def _path(self, name: str) -> Path:
        return self._directory / f"{_PREFIX}{name}.lock"
