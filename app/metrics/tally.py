"""The numbers of one HTTP worker: in memory, and in a file of its own that every HTTP worker can read.

The file outlives its process, also one that is killed: what has been counted stays counted. It is written with plain
writes, since a page of a mapped file that a full disk has no room for would kill the process.
"""

import contextlib
import fcntl
import os
import secrets
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from app.metrics.definitions import EDITION, Definition

SUFFIX = ".tally"

# A number of one metric: its name, the values of its labels. Histograms have one for each bucket ("le" and its bound),
# and one for the sum.
Key = tuple[str, ...]
Numbers = dict[Key, float]

BUCKET, SUM, INFINITY = "le", "sum", "+Inf"

# A record: length of the key, the number, the key. Numbers are written again at their place.
_HEAD = struct.Struct("<Id")
_ALIGNMENT = 8
_SEPARATOR = "\x1f"
# Sums are whole parts of a second (about a microsecond), of which doubles hold billions of seconds: they add up exactly
# in any order of the files, and never to less than before, which would look like a counter that began anew.
_GRAIN = 2**20


class Tally:
    """Counts at once, writes at `flush`. Without a folder it counts in memory only, and tries again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = f"{EDITION}-{os.getpid()}-{secrets.token_hex(8)}{SUFFIX}"
        self.numbers: Numbers = {}
        self._dirty: set[Key] = set()
        self._places: dict[Key, int] = {}
        self._end = 0
        self._file: int | None = None

    def add(self, definition: Definition, *labels: str, amount: float = 1.0) -> None:
        """Count."""
        key = (definition.name, *labels)
        self.numbers[key] = self.numbers.get(key, 0.0) + amount
        self._dirty.add(key)

    def set(self, definition: Definition, value: float) -> None:
        """Set a gauge."""
        key = (definition.name,)
        self.numbers[key] = value
        self._dirty.add(key)

    def observe(self, definition: Definition, values: Sequence[float]) -> None:
        """Take measured values, in bulk: each bound is looked up once, however many they are."""
        if not values:
            return
        ordered = sorted(values)
        below = 0
        for bound in definition.bounds:
            place = bisect_right(ordered, bound)
            if place > below:
                self._add_bucket(definition, repr(bound), place - below)
                below = place
            if below == len(ordered):
                break
        else:
            if below < len(ordered):
                self._add_bucket(definition, INFINITY, len(ordered) - below)
        key = (definition.name, SUM)
        self.numbers[key] = self.numbers.get(key, 0.0) + round(sum(ordered) * _GRAIN) / _GRAIN
        self._dirty.add(key)

    def flush(self) -> None:
        """Write what has changed. Never raises: what could not be written is written another time."""
        try:
            if self._file is None:
                self._create()
            assert self._file is not None
            for key in tuple(self._dirty):
                self._write(self._file, key)
                self._dirty.discard(key)
        except OSError:
            pass

    def close(self) -> None:
        """Nobody counts here any more; the file stays."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _add_bucket(self, definition: Definition, bound: str, count: int) -> None:
        key = (definition.name, BUCKET, bound)
        self.numbers[key] = self.numbers.get(key, 0.0) + count
        self._dirty.add(key)

    def _create(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # A file without a lock is taken for a dead process's, so it gets its name when it has the lock.
        unnamed = self._folder / f".{self.name}"
        file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(self._folder / self.name)
        except OSError:
            os.close(file)
            with contextlib.suppress(OSError):
                unnamed.unlink()
            raise
        self._file = file

    def _write(self, file: int, key: Key) -> None:
        place = self._places.get(key)
        if place is not None:
            os.pwrite(file, struct.pack("<d", self.numbers[key]), place + 4)
            return
        record = encode(key, self.numbers[key])
        if os.pwrite(file, record, self._end) < len(record):
            raise OSError("no room for the whole record")
        self._places[key] = self._end
        self._end += len(record)


def encode(key: Key, number: float) -> bytes:
    """Return a record."""
    text = _SEPARATOR.join(key).encode()
    record = _HEAD.pack(len(text), number) + text
    return record + b"\0" * (-len(record) % _ALIGNMENT)


def decode(data: bytes) -> Numbers:
    """Return the numbers of a file; a record that is not complete ends it."""
    numbers: Numbers = {}
    place = 0
    while place + _HEAD.size <= len(data):
        length, number = _HEAD.unpack_from(data, place)
        text = data[place + _HEAD.size : place + _HEAD.size + length]
        if not length or len(text) < length:
            break
        with contextlib.suppress(UnicodeDecodeError):
            numbers[tuple(text.decode().split(_SEPARATOR))] = number
        place += _HEAD.size + length + -(_HEAD.size + length) % _ALIGNMENT
    return numbers
