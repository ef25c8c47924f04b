"""The store as the routes use it: every call hops to one native thread, so neither disk nor JSON holds up the hub.

A thread of its own, not one of gevent's ten: a disk that hangs must not take the threads that tokenize prompts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gevent.threadpool import ThreadPool

from app.store.database import Database
from app.store.record import Listing, Page, Record, Retention
from app.store.records import Records
from app.store.runners import Runners

T = TypeVar("T")


class Store:
    """Records of all tenants. Opened by the first call that needs it. Every method raises `StoreError`."""

    def __init__(self, directory: Path, retention: Retention, clock: Callable[[], float] = time.time) -> None:
        self._database = Database(directory)
        self._runners = Runners(directory)
        self._records = Records(self._database, self._runners, retention, clock)
        self._thread: ThreadPool | None = None
        # Whether what earlier processes left unfinished was looked for.
        self._swept = False

    def add(self, record: Record, *, running: bool = False) -> None:
        """Keep a new record; ``running``: this process works on it, and if it dies the record is failed."""
        self._call(self._records.add, record, running)

    def get(self, kind: str, tenant: str, record_id: str) -> Record | None:
        """Return a record, or None if the tenant has none of this id. One whose runner died comes back as failed."""
        return self._call(self._records.get, kind, tenant, record_id)

    def settle(
        self,
        record_id: str,
        body: Mapping[str, Any],
        items: Sequence[str] = (),
        events: Sequence[tuple[int, bytes]] = (),
    ) -> bool:
        """Replace the body of a record that was running, with the status in it; ``items`` are ids in its output.

        Returns False, and changes nothing, if it is settled already (cancelled) or deleted.
        """
        return self._call(self._records.settle, record_id, body, items, events)

    def amend(self, kind: str, tenant: str, record_id: str, change: Callable[[Record], Record]) -> Record | None:
        """Return the record as ``change`` makes it of the present one, and keep it so; None if there is none."""
        return self._call(self._records.amend, kind, tenant, record_id, change)

    def delete(self, kind: str, tenant: str, record_id: str) -> bool:
        """Whether there was something to delete."""
        return self._call(self._records.delete, kind, tenant, record_id)

    def list(self, kind: str, tenant: str, listing: Listing) -> Page | None:
        """Return a page of records; None if ``listing.after`` is not one of them."""
        return self._call(self._records.list, kind, tenant, listing)

    def chain(self, kind: str, tenant: str, record_id: str, most: int) -> Sequence[Record] | None:
        """Return the record and all that it goes back to, oldest first; None if there is none of this id.

        They count as used now. Raises `ChainBroken` if an earlier one is missing, `TooMuch` if all are larger than
        ``most`` bytes.
        """
        return self._call(self._records.chain, kind, tenant, record_id, most)

    def items(self, tenant: str, item_ids: Sequence[str], most: int) -> Mapping[str, dict[str, Any]]:
        """Return those of the items that are in the input or output of a record, by id.

        Raises `TooMuch` if the records that have them are larger than ``most`` bytes.
        """
        return self._call(self._records.items, tenant, item_ids, most)

    def add_events(self, record_id: str, events: Sequence[tuple[int, bytes]]) -> bool:
        """Keep events of a running record; False if it is running no more (cancelled, deleted)."""
        return self._call(self._records.add_events, record_id, events)

    def events(self, record_id: str, after: int, limit: int) -> Sequence[tuple[int, bytes]]:
        """Return up to ``limit`` events behind number ``after``, in order."""
        return self._call(self._records.events, record_id, after, limit)

    def latest_event(self, record_id: str) -> tuple[int, bytes] | None:
        """Return the event with the highest number."""
        return self._call(self._records.latest_event, record_id)

    def close(self) -> None:
        """Give file and lock back; another call would open them again."""
        if self._thread is not None:
            self._thread.apply(self._close)
            self._thread.kill()
            self._thread = None

    def _close(self) -> None:
        self._swept = False
        self._runners.close()
        self._database.close()

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        if self._thread is None:
            self._thread = ThreadPool(1)

        def guarded() -> tuple[T | None, BaseException | None]:
            # An exception that reaches the thread pool is printed with a traceback; ours is an ordinary outcome.
            try:
                if not self._swept:
                    self._records.fail_orphans()
                    self._swept = True
                return function(*args), None
            except Exception as error:
                return None, error

        value, error = self._thread.apply(guarded)
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]
