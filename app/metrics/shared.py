"""The numbers of all HTTP workers together, of those that live and those that have died.

Each writes a file of its own (`app.metrics.tally`) and holds a lock on it, which the kernel lets go with the process:
so nobody has to be told that it has died. What dead ones have counted is put into one file, or there would be one more
with each reload. Readers take no lock, since a process that is stopped while it holds one would stop them all.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from app.metrics.definitions import BY_NAME, EDITION
from app.metrics.tally import SUFFIX, Key, Numbers, decode

_PAST = "past.json"
_TRIES = 5


class Past(msgspec.Struct, frozen=True):
    """What processes have counted that are no more; ``absorbed`` are the files of theirs that it contains."""

    edition: str = EDITION
    absorbed: list[str] = []
    numbers: list[tuple[list[str], float]] = []


def read(folder: Path, own: str, own_numbers: Numbers) -> Numbers:
    """Return the numbers of all HTTP workers; ``own`` is the file of the one that asks, whose numbers are at hand."""
    absorb(folder)
    total: Numbers = {}
    for _ in range(_TRIES):
        before = _signature(folder)
        past = _past(folder)
        total = {}
        for words, number in past.numbers:
            _add(total, tuple(words), number)
        for name in _files(folder):
            if name == own or name in past.absorbed:
                continue
            with contextlib.suppress(FileNotFoundError):
                _add_file(total, folder / name)
        if _signature(folder) == before:
            break
    for key, number in own_numbers.items():
        _add(total, key, number)
    return total


def absorb(folder: Path) -> None:
    """Put what dead processes have counted into one file. Does nothing if another process is at it, or on trouble."""
    with contextlib.suppress(OSError), _only_one(folder) as alone:
        if not alone:
            return
        past = _past(folder)
        dead = [name for name in _files(folder) if _is_dead(folder / name)]
        fresh = [name for name in dead if name not in past.absorbed]
        if fresh:
            total: Numbers = {tuple(words): number for words, number in past.numbers}
            for name in fresh:
                for key, number in decode((folder / name).read_bytes()).items():
                    if _stays(key):
                        _add(total, key, number)
            # Its name tells the files that are in it, so one that cannot be removed now is not counted twice.
            _write(folder, Past(EDITION, dead, [(list(key), number) for key, number in total.items()]))
        for name in dead:
            (folder / name).unlink()
        _remove_others(folder)


def _stays(key: Key) -> bool:
    return key[0] in BY_NAME and BY_NAME[key[0]].kind != "gauge"


def _add(total: Numbers, key: Key, number: float) -> None:
    definition = BY_NAME.get(key[0])
    if definition is None:
        return
    if definition.merge == "max":
        total[key] = max(total.get(key, 0.0), number)
    else:
        total[key] = total.get(key, 0.0) + number


def _add_file(total: Numbers, path: Path) -> None:
    dead = _is_dead(path)
    for key, number in decode(path.read_bytes()).items():
        if not dead or _stays(key):
            _add(total, key, number)


def _is_dead(path: Path) -> bool:
    """Whether nobody holds the file's lock."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(file)


def _files(folder: Path) -> list[str]:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    return [name for name in names if name.startswith(f"{EDITION}-") and name.endswith(SUFFIX)]


def _remove_others(folder: Path) -> None:
    """Files of another edition, and of processes that died before theirs had a name."""
    for path in list(folder.iterdir()):
        if path.name.endswith(SUFFIX) and not path.name.startswith(f"{EDITION}-") and _is_dead(path):
            path.unlink()


def _signature(folder: Path) -> tuple[int, int] | None:
    try:
        found = (folder / _PAST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _past(folder: Path) -> Past:
    try:
        past = msgspec.json.decode((folder / _PAST).read_bytes(), type=Past)
    except (OSError, msgspec.DecodeError):
        return Past()
    return past if past.edition == EDITION else Past()


def _write(folder: Path, past: Past) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".past-", delete=False) as file:
        try:
            file.write(msgspec.json.encode(past))
            file.flush()
            Path(file.name).rename(folder / _PAST)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
    """Give True to one at a time. Raises OSError without a folder."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)
