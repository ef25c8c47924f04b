"""The SQLite file: opened when it is first needed, private, shared by several processes (WAL), looked at for damage.

Used on one native thread only (`app.store.store`). A file that is damaged is moved aside, with an error in the log, and
a new one begun: what it held is lost to clients, but not to whoever wants to repair it. A file of a newer version of
this program is left alone, and the store stays unavailable.
"""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from app.store.errors import StoreError
from config import logs

log = logs.logger("tailrace.store")

FILE_NAME = "store.sqlite3"
SCHEMA_VERSION = 1
# How long a process waits for another one's transaction; each takes a few milliseconds.
BUSY_TIMEOUT_S = 5.0
_LARGEST_IDLE_WAL = 16 * 1024 * 1024

# number: order of arrival. used: when the record was last needed, for retention. runner: the process that works on it.
# size: bytes of body, input and events. item: which record has the item of this id.
_SCHEMA = f"""
CREATE TABLE record (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    runner TEXT,
    previous TEXT,
    created REAL NOT NULL,
    used REAL NOT NULL,
    size INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    body BLOB NOT NULL,
    input BLOB NOT NULL
);
CREATE INDEX record_by_use ON record (used, size);
CREATE INDEX record_by_tenant ON record (kind, tenant, number);
CREATE INDEX record_by_runner ON record (runner) WHERE runner IS NOT NULL;
CREATE TABLE item (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    record INTEGER NOT NULL REFERENCES record (number) ON DELETE CASCADE,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
CREATE INDEX item_by_record ON item (record);
CREATE TABLE event (
    record INTEGER NOT NULL REFERENCES record (number) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (record, sequence)
) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""
_TABLES = {"record", "item", "event"}


class Database:
    """The file ``directory``/store.sqlite3 and this process's connection to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / FILE_NAME
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        # Set when SQLite found damage while the file was in use: look at all of it at the next opening.
        self._suspect = False

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """Lend the connection inside a transaction: all of it happens, or nothing. Raises `StoreError`."""
        try:
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield connection
            except BaseException:
                _roll_back(connection)
                raise
            try:
                connection.execute("COMMIT")
            except sqlite3.Error:
                _roll_back(connection)
                raise
        except sqlite3.Error as error:
            raise self._explain(error) from error
        except OSError as error:
            raise StoreError(f"{self.directory}: {error.strerror}") from error

    def close(self) -> None:
        """Close the connection; the last one of all processes folds the log into the file."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._inode == _inode(self.path):
            return self._connection
        # Not open yet, or the file was moved or deleted under us.
        self.close()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.directory / "store.lock"):
            try:
                connection = self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._move_aside(error)
                connection = self._open()
            self._inode = _inode(self.path)
        self._connection = connection
        self._suspect = False
        return connection

    def _open(self) -> sqlite3.Connection:
        # Created here, because SQLite gives its log files the mode of this one.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            _prepare(connection, self._suspect)
        except BaseException:
            connection.close()
            raise
        return connection

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        log.error("the store is damaged: moved aside", path=str(self.path), reason=str(error), aside=aside)
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")

    def _explain(self, error: sqlite3.Error) -> StoreError:
        if _is_damage(error):
            self._suspect = True
            self.close()
        return StoreError(f"{self.path}: {error}")


def _prepare(connection: sqlite3.Connection, suspect: bool) -> None:
    """Settle how the connection works, and make the tables if the file is new. Raises `sqlite3.Error`, `StoreError`."""
    connection.execute("PRAGMA journal_mode = WAL")
    # A crash of this program loses nothing; a loss of power at most the last moments, and never the file.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    # What was deleted is overwritten.
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute(f"PRAGMA journal_size_limit = {_LARGEST_IDLE_WAL}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreError(f"the file is of a newer version of this program (schema {version}, not {SCHEMA_VERSION})")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if version == 0 and not tables:
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    elif version != SCHEMA_VERSION or not tables >= _TABLES:
        raise sqlite3.DatabaseError("it does not have our tables")
    if suspect:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # Raised by us, or by the Python side of the module.
        return type(error) is sqlite3.DatabaseError
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _roll_back(connection: sqlite3.Connection) -> None:
    # SQLite has done it already after some errors.
    with contextlib.suppress(sqlite3.Error):
        connection.execute("ROLLBACK")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time creates the file or moves it aside."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
