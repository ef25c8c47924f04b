"""What is kept: whose it is, for how long, and what happens when disk or file are no good."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.store import records
from app.store.database import FILE_NAME, SCHEMA_VERSION
from app.store.errors import ChainBroken, StoreError, TooLarge, TooMuch
from app.store.record import Listing, Record, Retention
from app.store.records import INTERRUPTED
from app.store.store import Store
from config.sources import ROOT
from tests.app.clock import Clock

ENOUGH = 10**6
PLENTY = Retention(max_items=1000, max_bytes=10**8, max_age_s=1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(tmp_path: Path, clock: Clock) -> Iterator:
    opened = []

    def make(retention: Retention = PLENTY, directory: Path = tmp_path / "state") -> Store:
        opened.append(Store(directory, retention, clock))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def record(record_id: str = "r1", tenant: str = "ann", status: str = "completed", **values: object) -> Record:
    made = Record(id=record_id, kind="response", tenant=tenant, model="m", status=status, body={"status": status})
    return replace(made, **values)


def ids(store: Store, tenant: str = "ann", **listing: object) -> list[str]:
    page = store.list("response", tenant, Listing(**{"limit": 100, **listing}))
    return [each.id for each in page.records]


def test_a_record_comes_back_as_it_was_kept_also_after_reopening(open_store):
    store = open_store()
    kept = record(
        body={"status": "completed", "text": "你好 😀"}, input=[{"id": "i"}], metadata={"a": "b"}, previous="p"
    )
    store.add(kept)
    assert store.get("response", "ann", "r1") == kept
    store.close()
    assert open_store().get("response", "ann", "r1") == kept


def test_nothing_is_created_before_it_is_needed(open_store, tmp_path):
    open_store().close()
    assert not (tmp_path / "state").exists()


def test_directory_and_files_are_private(open_store, tmp_path):
    old = os.umask(0)
    try:
        open_store().add(record())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    files = list((tmp_path / "state").iterdir())
    assert any(path.name.endswith("-wal") for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_what_belongs_to_one_tenant_does_not_exist_for_another(open_store):
    store = open_store()
    store.add(record(items=["i1"], status="in_progress"))
    assert store.get("response", "bob", "r1") is None
    assert store.get("chat", "ann", "r1") is None
    assert store.items("bob", ["i1"], ENOUGH) == {}
    assert store.chain("response", "bob", "r1", ENOUGH) is None
    assert store.amend("response", "bob", "r1", lambda present: replace(present, metadata={"x": "y"})) is None
    assert not store.delete("response", "bob", "r1")
    assert ids(store, "bob") == []
    assert store.get("response", "ann", "r1") is not None


def test_a_deleted_record_leaves_nothing(open_store, tmp_path):
    store = open_store()
    store.add(record(items=["i1"], body={"status": "x", "text": "secret canary"}, status="in_progress"), running=True)
    store.add_events("r1", [(0, b"e0")])
    assert store.delete("response", "ann", "r1")
    assert not store.delete("response", "ann", "r1")
    assert store.events("r1", -1, 10) == []
    assert store.items("ann", ["i1"], ENOUGH) == {}
    store.close()
    assert b"secret canary" not in (tmp_path / "state" / FILE_NAME).read_bytes()


def test_the_oldest_go_when_there_are_too_many(open_store, clock):
    store = open_store(replace(PLENTY, max_items=3))
    for number in range(5):
        clock.now += 1
        store.add(record(f"r{number}"))
    assert ids(store) == ["r2", "r3", "r4"]


def test_the_oldest_go_when_they_are_too_large_together(open_store, clock):
    store = open_store(replace(PLENTY, max_bytes=10_000))
    for number in range(5):
        clock.now += 1
        store.add(record(f"r{number}", body={"status": "completed", "text": "x" * 3000}))
    assert ids(store) == ["r2", "r3", "r4"]
    with pytest.raises(TooLarge):
        store.add(record("huge", body={"status": "completed", "text": "x" * 10_001}))
    assert ids(store) == ["r2", "r3", "r4"]


def test_what_nobody_used_for_too_long_is_gone(open_store, clock):
    store = open_store()
    store.add(record("old"))
    clock.now += 1001
    assert store.get("response", "ann", "old") is None
    assert ids(store) == []
    store.add(record("new"))
    assert ids(store) == ["new"]


def test_a_conversation_that_goes_on_stays_whole(open_store, clock):
    store = open_store()
    store.add(record("r1"))
    store.add(record("r2", previous="r1"))
    clock.now += 900
    assert [each.id for each in store.chain("response", "ann", "r2", ENOUGH)] == ["r1", "r2"]
    clock.now += 900
    assert [each.id for each in store.chain("response", "ann", "r2", ENOUGH)] == ["r1", "r2"]


def test_a_conversation_with_a_gap_says_what_is_missing(open_store):
    store = open_store()
    store.add(record("r1"))
    store.add(record("r2", previous="r1"))
    store.delete("response", "ann", "r1")
    with pytest.raises(ChainBroken) as raised:
        store.chain("response", "ann", "r2", ENOUGH)
    assert raised.value.missing == "r1"
    assert store.chain("response", "ann", "none", ENOUGH) is None


def test_no_more_is_read_at_once_than_is_allowed(open_store):
    store = open_store()
    text = "x" * 1000
    store.add(record("r1", input=[{"id": "i1", "text": text}, {"id": "i2", "text": text}], items=["i1", "i2"]))
    store.add(record("r2", input=[{"id": "i3", "text": text}], items=["i3"], previous="r1"))
    assert len(store.chain("response", "ann", "r2", 4000)) == 2
    with pytest.raises(TooMuch):
        store.chain("response", "ann", "r2", 3000)
    # Two items of one record are read once.
    assert set(store.items("ann", ["i2", "i1", "none"], 2500)) == {"i1", "i2"}
    with pytest.raises(TooMuch):
        store.items("ann", ["i1", "i3"], 2500)


def test_running_records_are_not_pushed_out(open_store, clock):
    store = open_store(replace(PLENTY, max_items=2))
    store.add(record("busy", status="in_progress"), running=True)
    for number in range(3):
        clock.now += 1
        store.add(record(f"r{number}"))
    assert ids(store) == ["busy", "r2"]


def test_only_a_running_record_is_settled_and_only_once(open_store):
    store = open_store()
    store.add(record(status="in_progress"), running=True)
    assert store.add_events("r1", [(0, b"a"), (1, b"b")])
    assert store.settle("r1", {"status": "completed"}, ["m1"], [(2, b"c")])
    assert store.get("response", "ann", "r1").status == "completed"
    (number,) = store._database._connection.execute("SELECT record FROM item WHERE id = 'm1'").fetchone()
    assert number == 1
    assert not store.settle("r1", {"status": "failed"})
    assert not store.add_events("r1", [(3, b"d")])
    assert store.events("r1", 0, 10) == [(1, b"b"), (2, b"c")]
    assert store.events("r1", -1, 2) == [(0, b"a"), (1, b"b")]


def test_records_are_listed_in_pages_by_model_and_metadata(open_store):
    store = open_store()
    for number in range(5):
        parity = "even" if number % 2 == 0 else "odd"
        store.add(record(f"r{number}", model=f"m{number % 2}", metadata={"parity": parity, 'quo"te': "'; --"}))
    page = store.list("response", "ann", Listing(limit=2))
    assert ([each.id for each in page.records], page.has_more) == (["r0", "r1"], True)
    page = store.list("response", "ann", Listing(limit=3, after="r1"))
    assert ([each.id for each in page.records], page.has_more) == (["r2", "r3", "r4"], False)
    assert ids(store, order="desc", after="r3") == ["r2", "r1", "r0"]
    assert ids(store, model="m1") == ["r1", "r3"]
    assert ids(store, metadata={"parity": "even", 'quo"te': "'; --"}) == ["r0", "r2", "r4"]
    assert ids(store, metadata={"parity": "even", "other": "x"}) == []
    assert store.list("response", "ann", Listing(after="unknown")) is None


_CHILD = """
import sys
from pathlib import Path
from app.store.record import Record, Retention
from app.store.store import Store
store = Store(Path(sys.argv[1]), Retention(1000, 10**8, 10**9), lambda: 1_000_000.0)
store.add(Record(id="child", kind="response", tenant="ann", model="m", status="queued", body={"status": "queued"}),
          running=True)
print("added", flush=True)
sys.stdin.read()
"""


def child(directory: Path) -> subprocess.Popen:
    """Another process that works on the record "child"."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(directory)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"added\n"
    return process


def test_a_record_whose_process_was_killed_is_failed_at_retrieval(open_store, tmp_path):
    store = open_store()
    store.add(record("mine", status="in_progress"), running=True)
    process = child(tmp_path / "state")
    try:
        assert store.get("response", "ann", "child").status == "queued"
    finally:
        process.kill()
        process.wait()
    found = store.get("response", "ann", "child")
    assert found.status == "failed"
    assert found.body == {"status": "failed", "error": {"code": "server_error", "message": INTERRUPTED}}
    assert not store.settle("child", {"status": "completed"})
    assert store.get("response", "ann", "mine").status == "in_progress"
    assert len(list((tmp_path / "state").glob("runner-*"))) == 1


def test_a_record_whose_process_was_killed_is_failed_at_the_next_start(open_store, tmp_path):
    process = child(tmp_path / "state")
    process.kill()
    process.wait()
    open_store().get("response", "ann", "anything")
    with sqlite3.connect(tmp_path / "state" / FILE_NAME) as connection:
        assert connection.execute("SELECT status FROM record WHERE id = 'child'").fetchall() == [("failed",)]


def test_an_orderly_end_leaves_one_file_and_no_lock(open_store, tmp_path):
    store = open_store()
    store.add(record(status="in_progress"), running=True)
    store.settle("r1", {"status": "completed"})
    store.close()
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["store.lock", FILE_NAME]


def test_two_processes_write_at_the_same_time(open_store, tmp_path):
    stores = [open_store(), open_store()]
    troubles: list[BaseException] = []

    def write(store: Store, name: str) -> None:
        try:
            for number in range(50):
                store._records.add(record(f"{name}{number}"), False)
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=write, args=(store, name)) for store, name in zip(stores, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert troubles == []
    assert len(ids(stores[0])) == 100


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough to be read" * 100, bytes(8192)])
def test_a_damaged_file_is_moved_aside(open_store, tmp_path, caplog, content):
    path = tmp_path / "state" / FILE_NAME
    path.parent.mkdir()
    path.write_bytes(content)
    store = open_store()
    store.add(record())
    assert ids(store) == ["r1"]
    (aside,) = path.parent.glob(f"{FILE_NAME}.damaged-*")
    assert aside.read_bytes() == content
    assert "damaged" in caplog.text


def test_a_file_with_other_tables_is_moved_aside(open_store, tmp_path):
    path = tmp_path / "state" / FILE_NAME
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    store = open_store()
    store.add(record())
    assert len(list(path.parent.glob(f"{FILE_NAME}.damaged-*"))) == 1


def test_damage_in_the_middle_of_the_file_is_found_in_use(open_store, tmp_path):
    store = open_store()
    for number in range(200):
        store.add(record(f"r{number}", body={"status": "completed", "text": "x" * 500}))
    store.close()
    path = tmp_path / "state" / FILE_NAME
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * (path.stat().st_size - 4 * 4096))
    with pytest.raises(StoreError):
        for number in range(200):
            store.get("response", "ann", f"r{number}")
    store.add(record("after"))
    assert ids(store) == ["after"]
    assert len(list(path.parent.glob(f"{FILE_NAME}.damaged-*[0-9]"))) == 1


def test_a_file_of_a_newer_version_is_left_alone(open_store, tmp_path):
    store = open_store()
    store.add(record())
    store.close()
    path = tmp_path / "state" / FILE_NAME
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match="newer version"):
        store.get("response", "ann", "r1")
    assert list(path.parent.glob("*.damaged-*")) == []


def test_a_file_that_was_deleted_under_us_is_begun_again(open_store, tmp_path):
    store = open_store()
    store.add(record())
    for path in (tmp_path / "state").glob(f"{FILE_NAME}*"):
        path.unlink()
    assert store.get("response", "ann", "r1") is None
    store.add(record("r2"))
    assert ids(open_store()) == ["r2"]


def test_a_full_disk_is_an_error_that_leaves_no_half_record(open_store):
    store = open_store()
    store.add(record("small", items=["i1"]))
    connection = store._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StoreError, match="full"):
        store.add(record("large", items=["i2"], body={"status": "completed", "text": "x" * 100_000}))
    assert ids(store) == ["small"]
    assert store.items("ann", ["i2"], ENOUGH) == {}
    connection.execute("PRAGMA max_page_count = 100000")
    store.add(record("large", items=["i2"], body={"status": "completed", "text": "x" * 100_000}))
    assert ids(store) == ["small", "large"]


def test_a_directory_that_cannot_be_made_is_an_error(open_store, tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(directory=tmp_path / "file" / "state")
    with pytest.raises(StoreError):
        store.get("response", "ann", "r1")
    with pytest.raises(StoreError):
        store.add(record())


def test_a_list_reads_no_input(open_store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked may be far larger than the answers, which are all that a list shows."""
    store = open_store()
    store.add(record("r1", input=[{"content": "secret"}]))
    read: list[str] = []
    loads = records.orjson.loads

    def noted(text: bytes | str) -> object:
        read.append(str(text))
        return loads(text)

    monkeypatch.setattr(records.orjson, "loads", noted)
    page = store.list("response", "ann", Listing())
    assert [each.id for each in page.records] == ["r1"]
    assert page.records[0].input == ()
    assert read
    assert not [each for each in read if "secret" in each]


def test_what_was_deleted_is_not_added_again(open_store, clock: Clock) -> None:
    store = open_store(Retention(max_items=3, max_bytes=10**8, max_age_s=10**6))
    store.add(record("r1", items=["i1"]))
    assert store.delete("response", "ann", "r1")
    store.add(record("r1"))
    assert store.get("response", "ann", "r1") is None
    assert not store.delete("response", "ann", "r1")
    assert store.list("response", "ann", Listing()).records == []
    # It takes nobody's place, and is forgotten in the end.
    for name in ("a", "b", "c"):
        store.add(record(name))
    assert sorted(ids(store)) == ["a", "b", "c"]
    clock.now += records.DELETED_AGE_S + 1
    assert store.delete("response", "ann", "a")
    store.add(record("r1"))
    assert "r1" in ids(store)


def test_only_so_many_deleted_ids_are_remembered(open_store) -> None:
    store = open_store(Retention(max_items=3, max_bytes=10**8, max_age_s=10**6))
    for number in range(9):
        store.add(record(f"r{number}"))
        assert store.delete("response", "ann", f"r{number}")
    store.add(record("r8"))
    store.add(record("r0"))
    assert ids(store) == ["r0"]
