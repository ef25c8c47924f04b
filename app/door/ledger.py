"""What each key's owner has open and has left, shared by all HTTP workers of one service: a file mapped into memory.

A lock of the kernel makes each booking one step for all of them; it is held for microseconds, and freed by the kernel
when its holder dies. Every worker counts its own open requests in a row of its own, so those of a worker that was
killed can be told and taken out. Nothing in the file tells a key or a text: owners are digests of their names.

Requests and tokens per minute are buckets that fill up evenly: an owner who was idle has a whole minute's worth.
"""

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gevent

from config import logs
from config.keys import KeyLimits

log = logs.logger("tailrace.door")

_MAGIC = b"tailrace-door-1\n"
_WORKERS = 512
_OWNERS = 1024
_ADDRESS_SETS = 1024
_ADDRESS_WAYS = 4

_WORKER = struct.Struct("<QQ")  # pid, when it started
_OWNER = struct.Struct("<16sqdddd")  # whose, open requests, requests left and when, tokens left and when
_ADDRESS = struct.Struct("<Qdd")  # whose, tries left and when
_COUNT = struct.Struct("<H")
_TIME = struct.Struct("<d")

_LAST_BAD_KEY_AT = 16
_WORKERS_AT = 32
_OWNERS_AT = _WORKERS_AT + _WORKERS * _WORKER.size
_ADDRESSES_AT = _OWNERS_AT + _OWNERS * _OWNER.size
_COUNTS_AT = _ADDRESSES_AT + _ADDRESS_SETS * _ADDRESS_WAYS * _ADDRESS.size
_SIZE = _COUNTS_AT + _OWNERS * _WORKERS * _COUNT.size

# A holder of the lock that was stopped (not killed) must not stop the others; rather a count is off by one then.
_LOCK_PATIENCE_S = 0.05
_LOCK_PAUSE_S = 0.0002


@dataclass(slots=True)
class Account:
    """What an owner has after a booking; None where there is no limit. ``refusal``: why there was none."""

    limits: KeyLimits
    requests_left: float | None = None
    tokens_left: float | None = None
    refusal: str | None = None
    retry_after: float = 0.0


class Ledger:
    """One worker's view of the file at ``path``, which is made if there is none."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            if os.fstat(self._descriptor).st_size != _SIZE or os.pread(self._descriptor, 16, 0) != _MAGIC:
                os.ftruncate(self._descriptor, 0)
                # All of its pages are there from now on: one that a full disk has no room for would kill the process.
                os.posix_fallocate(self._descriptor, 0, _SIZE)
                os.pwrite(self._descriptor, _MAGIC, 0)
            self._memory = mmap.mmap(self._descriptor, _SIZE)
            self._places: dict[str, int] = {}
            self._row = self._register()
        except BaseException:
            os.close(self._descriptor)  # and with it the lock
            raise
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the row back."""
        with self._locked():
            self._strike_out(self._row)
        self._memory.close()
        os.close(self._descriptor)

    # --- what a key's owner has open and left

    def enter(self, owner: str, limits: KeyLimits) -> Account:
        """Book one request, which is open until `leave`, or say in ``refusal`` which limit it would cross."""
        account = Account(limits)
        with self._locked():
            place = self._place(owner)
            whose, count, requests, requests_at, tokens, tokens_at = self._owner(place)
            now = self._clock()
            if limits.concurrent and count >= limits.concurrent:
                count = self._recount(place)
            if limits.requests_per_minute:
                requests = _filled(requests, requests_at, limits.requests_per_minute, now)
                requests_at, account.requests_left = now, requests
            if limits.tokens_per_minute:
                tokens = _filled(tokens, tokens_at, limits.tokens_per_minute, now)
                tokens_at, account.tokens_left = now, tokens
            if limits.concurrent and count >= limits.concurrent:
                account.refusal, account.retry_after = "concurrent requests", 1.0
            elif account.requests_left is not None and requests < 1:
                account.refusal = "requests per minute"
                account.retry_after = _seconds(1 - requests, limits.requests_per_minute)
            elif account.tokens_left is not None and tokens < 1:
                account.refusal = "tokens per minute"
                account.retry_after = _seconds(1 - tokens, limits.tokens_per_minute)
            else:
                count += 1
                if account.requests_left is not None:
                    requests -= 1
                    account.requests_left = requests
                self._count(place, +1)
            _OWNER.pack_into(self._memory, place, whose, count, requests, requests_at, tokens, tokens_at)
        return account

    def leave(self, owner: str) -> None:
        """The request that `enter` booked is over."""
        with self._locked():
            place = self._place(owner)
            whose, count, *rest = self._owner(place)
            _OWNER.pack_into(self._memory, place, whose, max(0, count - 1), *rest)
            self._count(place, -1)

    def book_tokens(self, owner: str, limits: KeyLimits, tokens: float, *, least: float | None = None) -> Account:
        """Take ``tokens`` from what is left (negative: give back); with ``least`` only if so many are left.

        What was given without asking may make it less than nothing, which takes its time to fill up.
        """
        account = Account(limits)
        per_minute = limits.tokens_per_minute
        if not per_minute:
            return account
        with self._locked():
            place = self._place(owner)
            whose, count, requests, requests_at, left, left_at = self._owner(place)
            now = self._clock()
            left = _filled(left, left_at, per_minute, now)
            if least is not None and left < least:
                account.refusal, account.retry_after = "tokens per minute", _seconds(least - left, per_minute)
            else:
                left = min(float(per_minute), left - tokens)
            account.tokens_left = left
            _OWNER.pack_into(self._memory, place, whose, count, requests, requests_at, left, now)
        return account

    # --- addresses that try keys

    def blocked(self, address: str, per_minute: int) -> float:
        """Return for how many seconds ``address`` may try no key; 0: it may."""
        now = self._clock()
        last = _TIME.unpack_from(self._memory, _LAST_BAD_KEY_AT)[0]
        if not 0 <= now - last < 60:
            return 0.0
        whose = _address_id(address)
        for place in self._ways(whose):
            found, left, at = _ADDRESS.unpack_from(self._memory, place)
            if found == whose:
                left = _filled(left, at, per_minute, now)
                return 0.0 if left >= 1 else _seconds(1 - left, per_minute)
        return 0.0

    def bad_key(self, address: str, per_minute: int) -> bool:
        """Note that ``address`` tried a wrong key; return whether that was the last one it may try for now."""
        whose = _address_id(address)
        with self._locked():
            now = self._clock()
            _TIME.pack_into(self._memory, _LAST_BAD_KEY_AT, now)
            entries = [(*_ADDRESS.unpack_from(self._memory, place), place) for place in self._ways(whose)]
            known = [entry for entry in entries if entry[0] == whose]
            # In place of whoever has tried none for longest.
            _, left, at, place = known[0] if known else min(entries, key=lambda entry: float(entry[2]))
            left = _filled(left, at, per_minute, now) if known else float(per_minute)
            _ADDRESS.pack_into(self._memory, place, whose, left - 1, now)
        return left >= 1 > left - 1

    # --- places in the file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """All workers' turn-taking; within this worker nobody else runs, since nothing in here waits."""
        deadline = 0.0
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + _LOCK_PATIENCE_S
                if now >= deadline:
                    log.warning("the ledger's lock is not to be had; going on without")
                    break
                gevent.sleep(_LOCK_PAUSE_S)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _owner(self, place: int) -> tuple[bytes, int, float, float, float, float]:
        return _OWNER.unpack_from(self._memory, place)

    def _place(self, owner: str) -> int:
        """Where ``owner``'s record is; a new one takes a place without open requests that was not used for longest."""
        known = self._places.get(owner)
        whose = hashlib.sha256(owner.encode()).digest()[:16]
        if known is not None and self._memory[known : known + 16] == whose:
            return known
        places = range(_OWNERS_AT, _ADDRESSES_AT, _OWNER.size)
        free, oldest = _OWNERS_AT, float("inf")
        for place in places:
            found, count, _, requests_at, _, tokens_at = self._owner(place)
            if found == whose:
                break
            last = max(requests_at, tokens_at) if any(found) else -1.0
            if count == 0 and last < oldest:
                free, oldest = place, last
        else:
            place = free
            _OWNER.pack_into(self._memory, place, whose, 0, 0.0, 0.0, 0.0, 0.0)
        self._places[owner] = place
        return place

    def _count_at(self, place: int, row: int) -> int:
        return _COUNTS_AT + ((place - _OWNERS_AT) // _OWNER.size * _WORKERS + row) * _COUNT.size

    def _count(self, place: int, change: int) -> None:
        at = self._count_at(place, self._row)
        _COUNT.pack_into(self._memory, at, max(0, _COUNT.unpack_from(self._memory, at)[0] + change))

    @staticmethod
    def _ways(whose: int) -> range:
        first = _ADDRESSES_AT + whose % _ADDRESS_SETS * _ADDRESS_WAYS * _ADDRESS.size
        return range(first, first + _ADDRESS_WAYS * _ADDRESS.size, _ADDRESS.size)

    # --- workers

    def _register(self) -> int:
        """Take a row; strike out what the dead have left."""
        own = (os.getpid(), _started(os.getpid()))
        row = None
        for each in range(_WORKERS):
            pid, started = _WORKER.unpack_from(self._memory, _WORKERS_AT + each * _WORKER.size)
            if pid and (pid, started) != own and _started(pid) == started:
                continue
            if pid:
                self._strike_out(each)
            if row is None:
                row = each
        if row is None:
            raise OSError("too many HTTP workers")
        _WORKER.pack_into(self._memory, _WORKERS_AT + row * _WORKER.size, *own)
        return row

    def _recount(self, place: int) -> int:
        """Return how many requests the workers that live have open with this owner; rows of the dead are struck out.

        Each row is written by its worker alone, so the sum is right even where the owner's own count is not: after a
        step without the lock, or in a file that was damaged.
        """
        count = 0
        for row in range(_WORKERS):
            own = _COUNT.unpack_from(self._memory, self._count_at(place, row))[0]
            if own and row != self._row:
                pid, started = _WORKER.unpack_from(self._memory, _WORKERS_AT + row * _WORKER.size)
                if not pid or _started(pid) != started:
                    self._strike_out(row)
                    continue
            count += own
        return count

    def _strike_out(self, row: int) -> None:
        for place in range(_OWNERS_AT, _ADDRESSES_AT, _OWNER.size):
            at = self._count_at(place, row)
            own = _COUNT.unpack_from(self._memory, at)[0]
            if own:
                whose, count, *rest = self._owner(place)
                _OWNER.pack_into(self._memory, place, whose, max(0, count - own), *rest)
                _COUNT.pack_into(self._memory, at, 0)
        _WORKER.pack_into(self._memory, _WORKERS_AT + row * _WORKER.size, 0, 0)


def _filled(left: float, at: float, per_minute: int, now: float) -> float:
    """What a bucket holds now; one that was never used (or before the machine started) is full."""
    if at <= 0 or at > now:
        return float(per_minute)
    return min(float(per_minute), left + (now - at) * per_minute / 60)


def _seconds(missing: float, per_minute: int | None) -> float:
    """How long it takes until so much is there."""
    return missing * 60 / (per_minute or 1)


def _address_id(address: str) -> int:
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest(), "little") or 1


def _started(pid: int) -> int:
    """When the process started, in the kernel's ticks: with the pid its identity. 0: it is no more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - in the middle of a request
            after_name = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if after_name[0] in (b"Z", b"X") else int(after_name[19])
