"""What is done with records, in SQL. Runs on the store's thread."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from app.store.database import Database
from app.store.errors import ChainBroken, StoreError, TooLarge, TooMuch
from app.store.record import RUNNING, Listing, Page, Record, Retention
from app.store.runners import Runners

INTERRUPTED = "The server stopped before the response was complete."
# A conversation longer than this is no conversation.
MAX_CHAIN = 10_000
# The kind and the status of what is left of a record that was deleted: its id, for longer than any request is kept to
# be read again.
_DELETED = "deleted"
DELETED_AGE_S = 86_400.0
# How many records one insert may push out at most; the rest goes with the next one.
_EVICTED_AT_ONCE = 1000


_SHOWN = "id, kind, tenant, model, status, body, metadata, previous, number, runner"
_COLUMNS = f"{_SHOWN}, input"


class Records:
    """The statements. ``clock`` gives seconds since 1970."""

    def __init__(
        self, database: Database, runners: Runners, retention: Retention, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._runners = runners
        self._retention = retention
        self._clock = clock

    def add(self, record: Record, running: bool) -> None:
        """Keep it, and drop what is beyond the retention limits. Raises `TooLarge`, `StoreError`.

        What two readers of one kept request bring is kept once.
        """
        body, given, metadata = _encoded(record.body), _encoded(record.input), _encoded(record.metadata)
        size = len(body) + len(given) + len(metadata)
        if size > self._retention.max_bytes:
            raise TooLarge(f"a record of {size} bytes")
        now = self._clock()
        with self._database.transaction(write=True) as connection:
            runner = self._own_runner() if running else None
            added = connection.execute(
                "INSERT OR IGNORE INTO record (id, kind, tenant, model, status, runner, previous, created, used, size,"
                " metadata, body, input) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.id, record.kind, record.tenant, record.model, record.status, runner, record.previous,
                    now, now, size, metadata.decode(), body, given,
                ),
            )  # fmt: skip
            if not added.rowcount:
                return
            _add_items(connection, record.tenant, added.lastrowid, record.items)
            self._evict(connection, now)

    def get(self, kind: str, tenant: str, record_id: str) -> Record | None:
        """Return it; a running one whose process died is failed first."""
        with self._database.transaction(write=False) as connection:
            row = self._row(connection, kind, tenant, record_id)
        if row is None:
            return None
        record = _record(row)
        if record.is_running and row["runner"] is not None and not self._alive(row["runner"]):
            self._fail_orphans(row["runner"])
            with self._database.transaction(write=False) as connection:
                row = self._row(connection, kind, tenant, record_id)
            return None if row is None else _record(row)
        return record

    def settle(
        self, record_id: str, body: Mapping[str, Any], items: Sequence[str], events: Sequence[tuple[int, bytes]]
    ) -> bool:
        """Replace body and status of a running record, and add events; False if it is not running."""
        encoded = _encoded(body)
        with self._database.transaction(write=True) as connection:
            row = connection.execute(
                "SELECT number, tenant, length(body) FROM record WHERE id = ? AND status IN (?, ?)",
                (record_id, *RUNNING),
            ).fetchone()
            if row is None:
                return False
            number, tenant, old = row
            status = str(body["status"])
            connection.execute(
                "UPDATE record SET body = ?, status = ?, size = size + ?,"
                " runner = CASE WHEN ? THEN runner ELSE NULL END WHERE number = ?",
                (encoded, status, len(encoded) - old, status in RUNNING, number),
            )
            _add_items(connection, tenant, number, items)
            if events:
                _write_events(connection, number, events)
        return True

    def amend(self, kind: str, tenant: str, record_id: str, change: Callable[[Record], Record]) -> Record | None:
        """Keep and return what ``change`` makes of the present record, in one transaction."""
        if self.get(kind, tenant, record_id) is None:
            return None
        with self._database.transaction(write=True) as connection:
            row = self._row(connection, kind, tenant, record_id)
            if row is None:
                return None
            present = _record(row)
            record = change(present)
            if record is present:
                return record
            body, metadata = _encoded(record.body), _encoded(record.metadata)
            connection.execute(
                "UPDATE record SET body = ?, metadata = ?, status = ?, size = size + ?,"
                " runner = CASE WHEN ? THEN runner ELSE NULL END WHERE number = ?",
                (
                    body, metadata.decode(), record.status,
                    len(body) + len(metadata) - len(row["body"]) - len(row["metadata"].encode()),
                    record.is_running, row["number"],
                ),
            )  # fmt: skip
        return record

    def delete(self, kind: str, tenant: str, record_id: str) -> bool:
        """Whether there was one. Its id stays taken: who reads a kept request again must not bring it back."""
        now = self._clock()
        with self._database.transaction(write=True) as connection:
            gone = connection.execute(
                "DELETE FROM record WHERE id = ? AND kind = ? AND tenant = ?", (record_id, kind, tenant)
            )
            if not gone.rowcount:
                return False
            connection.execute(
                "INSERT INTO record (id, kind, tenant, model, status, created, used, size, metadata, body, input)"
                " VALUES (?, ?, ?, '', ?, ?, ?, 0, '{}', '', '')",
                (record_id, _DELETED, tenant, _DELETED, now, now),
            )
            connection.execute(
                "DELETE FROM record WHERE kind = ? AND (used < ? OR number NOT IN"
                " (SELECT number FROM record WHERE kind = ? ORDER BY number DESC LIMIT ?))",
                (_DELETED, now - DELETED_AGE_S, _DELETED, max(self._retention.max_items, 1)),
            )
        return True

    def list(self, kind: str, tenant: str, listing: Listing) -> Page | None:
        """One page; None if there is no record ``listing.after``."""
        where = ["kind = ?", "tenant = ?", "used >= ?"]
        values: list[Any] = [kind, tenant, self._oldest()]
        if listing.model is not None:
            where.append("model = ?")
            values.append(listing.model)
        for name, value in listing.metadata.items():
            where.append(
                "EXISTS (SELECT 1 FROM json_each(record.metadata) AS pair WHERE pair.key = ? AND pair.value = ?)"
            )
            values += [name, value]
        with self._database.transaction(write=False) as connection:
            if listing.after is not None:
                row = self._row(connection, kind, tenant, listing.after)
                if row is None:
                    return None
                where.append("number > ?" if listing.order == "asc" else "number < ?")
                values.append(row["number"])
            direction = "ASC" if listing.order == "asc" else "DESC"
            cursor = connection.execute(
                f"SELECT {_SHOWN} FROM record WHERE {' AND '.join(where)} ORDER BY number {direction} LIMIT ?",
                (*values, listing.limit + 1),
            )
            records: list[Record] = []
            left = listing.max_bytes
            # One by one: a hundred of them may be far more than there is memory for.
            for row in _each_row(cursor):
                left -= len(row["body"])
                if len(records) == listing.limit or (records and left < 0):
                    return Page(records, True)
                records.append(_record(row))
        return Page(records, False)

    def chain(self, kind: str, tenant: str, record_id: str, most: int) -> Sequence[Record] | None:
        """The conversation up to this record, oldest first. A conversation that goes on is not forgotten in parts."""
        found: list[Record] = []
        left = most
        wanted: str | None = record_id
        with self._database.transaction(write=True) as connection:
            while wanted is not None:
                row = self._row(connection, kind, tenant, wanted)
                if row is None and not found:
                    return None
                if row is None or len(found) >= MAX_CHAIN:
                    raise ChainBroken(wanted)
                left -= _bytes(row)
                if left < 0:
                    raise TooMuch(most)
                found.append(_record(row))
                connection.execute("UPDATE record SET used = ? WHERE number = ?", (self._clock(), row["number"]))
                wanted = found[-1].previous
        return found[::-1]

    def items(self, tenant: str, item_ids: Sequence[str], most: int) -> dict[str, dict[str, Any]]:
        """Those of the items that are kept, by id. A record that has several of them is read once."""
        found: dict[str, dict[str, Any]] = {}
        asked: dict[int, set[str]] = {}
        left = most
        with self._database.transaction(write=False) as connection:
            for item_id in item_ids:
                query = "SELECT record FROM item WHERE tenant = ? AND id = ?"
                for (number,) in connection.execute(query, (tenant, item_id)):
                    asked.setdefault(number, set()).add(item_id)
            for number, wanted in asked.items():
                query = f"SELECT {_COLUMNS} FROM record WHERE used >= ? AND number = ?"
                for row in _rows(connection.execute(query, (self._oldest(), number))):
                    left -= _bytes(row)
                    if left < 0:
                        raise TooMuch(most)
                    record = _record(row)
                    # The last one of an id counts: what came in before what the model made of it.
                    items = (*record.body.get("output", ()), *record.input)
                    found |= {item["id"]: dict(item) for item in items if item.get("id") in wanted}
        return found

    def add_events(self, record_id: str, events: Sequence[tuple[int, bytes]]) -> bool:
        """Keep events; with none, only tell whether the record is running."""
        with self._database.transaction(write=bool(events)) as connection:
            row = connection.execute(
                "SELECT number FROM record WHERE id = ? AND status IN (?, ?)", (record_id, *RUNNING)
            ).fetchone()
            if row is None:
                return False
            if events:
                _write_events(connection, row[0], events)
        return True

    def events(self, record_id: str, after: int, limit: int) -> Sequence[tuple[int, bytes]]:
        """The events behind ``after``."""
        with self._database.transaction(write=False) as connection:
            return connection.execute(
                "SELECT sequence, event.body FROM event JOIN record ON record.number = event.record"
                " WHERE record.id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (record_id, after, limit),
            ).fetchall()

    def latest_event(self, record_id: str) -> tuple[int, bytes] | None:
        """The last event."""
        with self._database.transaction(write=False) as connection:
            found: tuple[int, bytes] | None = connection.execute(
                "SELECT sequence, event.body FROM event JOIN record ON record.number = event.record"
                " WHERE record.id = ? ORDER BY sequence DESC LIMIT 1",
                (record_id,),
            ).fetchone()
        return found

    # --- retention, and processes that died

    def _oldest(self) -> float:
        return self._clock() - self._retention.max_age_s

    def _evict(self, connection: sqlite3.Connection, now: float) -> None:
        """Drop what is too old, then the oldest until number and bytes are within the limits."""
        kept = self._retention
        connection.execute("DELETE FROM record WHERE used < ? AND status NOT IN (?, ?)", (self._oldest(), *RUNNING))
        items, size = connection.execute("SELECT count(*), coalesce(sum(size), 0) FROM record").fetchone()
        items -= connection.execute("SELECT count(*) FROM record WHERE kind = ?", (_DELETED,)).fetchone()[0]
        if items <= kept.max_items and size <= kept.max_bytes:
            return
        oldest = connection.execute(
            "SELECT number, size FROM record WHERE status NOT IN (?, ?, ?) ORDER BY used, number LIMIT ?",
            (*RUNNING, _DELETED, _EVICTED_AT_ONCE),
        ).fetchall()
        for number, each in oldest:
            if items <= kept.max_items and size <= kept.max_bytes:
                break
            connection.execute("DELETE FROM record WHERE number = ?", (number,))
            items, size = items - 1, size - each

    def _fail_orphans(self, runner: str) -> None:
        with self._database.transaction(write=True) as connection:
            rows = _rows(
                connection.execute(
                    f"SELECT {_COLUMNS} FROM record WHERE runner = ? AND status IN (?, ?)", (runner, *RUNNING)
                )
            )
            for row in rows:
                error = {"code": "server_error", "message": INTERRUPTED}
                body = _encoded({**orjson.loads(row["body"]), "status": "failed", "error": error})
                connection.execute(
                    "UPDATE record SET status = 'failed', runner = NULL, body = ?, size = size + ? WHERE number = ?",
                    (body, len(body) - len(row["body"]), row["number"]),
                )

    def fail_orphans(self) -> None:
        """Mark as failed whatever processes that are no more were working on."""
        with self._database.transaction(write=False) as connection:
            runners = connection.execute("SELECT DISTINCT runner FROM record WHERE runner IS NOT NULL").fetchall()
        for (runner,) in runners:
            if not self._alive(runner):
                self._fail_orphans(runner)

    def _own_runner(self) -> str:
        try:
            return self._runners.own()
        except OSError as error:
            raise StoreError(f"lock file: {error.strerror}") from error

    def _alive(self, runner: str) -> bool:
        try:
            return self._runners.is_alive(runner)
        except OSError as error:
            raise StoreError(f"lock file: {error.strerror}") from error

    def _row(self, connection: sqlite3.Connection, kind: str, tenant: str, record_id: str) -> dict[str, Any] | None:
        rows = _rows(
            connection.execute(
                f"SELECT {_COLUMNS} FROM record WHERE id = ? AND kind = ? AND tenant = ? AND used >= ?",
                (record_id, kind, tenant, self._oldest()),
            )
        )
        return rows[0] if rows else None


def _rows(cursor: sqlite3.Cursor) -> list[dict[str, Any]]:
    return list(_each_row(cursor))


def _each_row(cursor: sqlite3.Cursor) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in cursor.description]
    for row in cursor:
        yield dict(zip(names, row, strict=True))


def _bytes(row: Mapping[str, Any]) -> int:
    return len(row["body"]) + len(row["input"])


def _record(row: Mapping[str, Any]) -> Record:
    return Record(
        id=row["id"],
        kind=row["kind"],
        tenant=row["tenant"],
        model=row["model"],
        status=row["status"],
        body=orjson.loads(row["body"]),
        input=orjson.loads(row["input"]) if "input" in row else (),
        metadata=orjson.loads(row["metadata"]),
        previous=row["previous"],
    )


def _encoded(value: Any) -> bytes:
    return orjson.dumps(value)


def _add_items(connection: sqlite3.Connection, tenant: str, number: int | None, items: Sequence[str]) -> None:
    # An item that a client sends back is the one that it already had.
    connection.executemany(
        "INSERT OR IGNORE INTO item (tenant, id, record) VALUES (?, ?, ?)", [(tenant, each, number) for each in items]
    )


def _write_events(connection: sqlite3.Connection, number: int, events: Sequence[tuple[int, bytes]]) -> None:
    connection.executemany(
        "INSERT INTO event (record, sequence, body) VALUES (?, ?, ?)",
        [(number, sequence, body) for sequence, body in events],
    )
    connection.execute(
        "UPDATE record SET size = size + ? WHERE number = ?", (sum(len(body) for _, body in events), number)
    )
