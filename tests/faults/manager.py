"""systemd's end of the notification protocol: a datagram socket that knows who has sent each message."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.workers.pool.harness import PATIENCE

_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Word:
    """One message: when it came, who sent it, and its lines as names and values."""

    at: float
    pid: int
    said: dict[str, str]


class Manager:
    """Listens at a path in ``directory``; a thread reads, so that nobody finds the socket full."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self.path))
        self._words: list[Word] = []
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def words(self) -> list[Word]:
        """All that came so far."""
        with self._news:
            return list(self._words)

    def wait(self, wanted: Callable[[Word], object], what: str, *, after: Word | None = None) -> Word:
        """Return the first word that is ``wanted`` (behind ``after``); wait for it, or fail."""
        # Long enough for a whole service to start.
        deadline = time.monotonic() + 3 * PATIENCE
        seen = 0
        with self._news:
            if after is not None:
                seen = self._words.index(after) + 1
            while True:
                for word in self._words[seen:]:
                    seen += 1
                    if wanted(word):
                        return word
                left = deadline - time.monotonic()
                assert left > 0, f"waited in vain for {what}; heard {[word.said for word in self._words[-20:]]}"
                self._news.wait(left)

    def wait_said(self, name: str, value: str = "", *, after: Word | None = None) -> Word:
        """Return the first word with a line ``name`` whose value has ``value`` in it."""
        return self.wait(lambda word: name in word.said and value in word.said[name], f"{name}={value}", after=after)

    def between(self, first: Word, last: Word) -> list[Word]:
        """Return what came between two words."""
        words = self.words
        return words[words.index(first) + 1 : words.index(last)]

    def close(self) -> None:
        """Hear no more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
            ours.sendto(b"", str(self.path))

    def _listen(self) -> None:
        with self._socket:
            while True:
                message, extra, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(_CREDENTIALS.size))
                if not message:
                    return
                pid = _CREDENTIALS.unpack(extra[0][2])[0]
                lines = (line.partition("=") for line in message.decode().splitlines())
                word = Word(time.monotonic(), pid, {name: value for name, _, value in lines})
                with self._news:
                    self._words.append(word)
                    self._news.notify_all()
