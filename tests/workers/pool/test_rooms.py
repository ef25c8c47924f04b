"""Kept requests in the pool: what is written down, who may read it, and when it is forgotten."""

from collections.abc import Callable

import msgspec
import pytest

from workers.messages import (
    Attach,
    Cancel,
    Embedded,
    Event,
    Failed,
    GenerateJob,
    Keep,
    Kept,
    Output,
    Queued,
    Started,
    TokenLogprobs,
)
from workers.pool import room as one_room
from workers.pool import rooms as module
from workers.pool.journal import Entry
from workers.pool.room import EVENTS_AT_A_TIME, Room
from workers.pool.rooms import Rooms

WINDOW_S = 60.0


class Connection:
    """An HTTP worker, as far as rooms see it."""

    def __init__(self) -> None:
        self.pending = bytearray()
        self.events: list[Event] = []
        self.post = self.events.append

    def take(self) -> list[Event]:
        taken = list(self.events)
        self.events.clear()
        return taken


class Bench:
    """Rooms with a clock of their own, and a broker that only notes what it is told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.cancels: list[Cancel] = []
        self.rooms = Rooms(self, window_s=WINDOW_S, clock=lambda: self.now)

    def cancel(self, client: Room, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        entry = client.jobs[cancel.id]
        assert cancel.choice is not None
        entry.drop(cancel.choice)
        if entry.complete:
            del client.jobs[cancel.id]

    def client_gone(self, client: Room) -> None:
        self.cancels += [Cancel(id=job_id) for job_id in client.jobs]
        client.jobs.clear()

    def found(self, reader: Connection, request: str = "r", jobs: int = 1, n: int = 1, **fields: object) -> Room:
        """Keep a request and give the broker its jobs."""
        values = {"id": request, "owner": "ann", "jobs": jobs, **fields}
        kept = self.rooms.keep(reader, msgspec.convert(values, Keep))
        assert kept.request == request
        for place in range(jobs):
            room = self.bring(reader, request if jobs == 1 else f"{request}/{place}", n)
        assert room is not None
        return room

    def bring(self, reader: Connection, job_id: str, n: int = 1) -> Room | None:
        """Bring a job of a kept request."""
        job = GenerateJob(id=job_id, prompt=[1], max_tokens=9, n=n, kept=job_id.partition("/")[0])
        room = self.rooms.room_for(reader, job)
        if room is not None:
            room.jobs[job_id] = Entry(job, room)
        return room

    def attach(self, reader: Connection, request: str = "r", alias: str = "a", owner: str = "ann") -> Kept:
        self.rooms.attach(reader, Attach(alias=alias, request=request, owner=owner))
        self.rooms.pump()
        (kept,) = reader.take()
        assert isinstance(kept, Kept)
        return kept

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.rooms.tend(self.now)

    def is_kept(self, request: str = "r") -> bool:
        reader = Connection()
        found = bool(self.attach(reader, request, "probe").request)
        self.rooms.client_gone(reader)
        return found


@pytest.fixture
def bench() -> Bench:
    return Bench()


def say(room: Room, *tokens: int, **last: object) -> list[Event]:
    """What a model worker says, as the broker passes it on."""
    events: list[Event] = [Output(id=room.id, ids=[token]) for token in tokens]
    if last:
        events.append(msgspec.convert({"id": room.id, **last}, Output))
    for event in events:
        room.post(event)
    return events


def finish(room: Room) -> list[Event]:
    events = say(room, finish_reason="length")
    room.jobs.clear()
    return events


def renamed(events: list[Event], alias: str, request: str = "r") -> list[Event]:
    return [msgspec.structs.replace(event, id=alias + event.id[len(request) :]) for event in events]


def test_a_late_reader_gets_the_same_events_one_by_one_and_then_what_comes(bench: Bench) -> None:
    founder, late = Connection(), Connection()
    room = bench.found(founder)
    room.post(Started(id="r"))
    early = [Started(id="r"), *say(room, 1, 2, 3)]
    kept = bench.attach(late)
    assert kept.request == "r"
    live = say(room, 4)  # not before what was said earlier
    assert late.take() == []
    bench.rooms.pump()
    live += say(room, 5) + finish(room)
    assert founder.take() == early + live
    assert late.take() == renamed(early + live, "a")


def test_the_ids_of_several_jobs_are_told_under_the_readers_name(bench: Bench) -> None:
    founder, late = Connection(), Connection()
    room = bench.found(founder, jobs=2)
    room.post(Output(id="r/0", ids=[1]))
    room.post(Output(id="r/1", ids=[2]))
    bench.attach(late)
    bench.rooms.pump()
    assert [event.id for event in late.take()] == ["a/0", "a/1"]
    bench.rooms.cancel(late, Cancel(id="a/1", choice=0))
    assert bench.cancels == [Cancel(id="r/1", choice=0)]


def test_places_in_the_queue_are_told_and_not_written_down(bench: Bench) -> None:
    founder, late = Connection(), Connection()
    room = bench.found(founder)
    room.post(Queued(id="r", position=3))
    assert founder.take() == [Queued(id="r", position=3)]
    bench.attach(late)
    bench.rooms.pump()
    assert late.take() == []


def test_a_long_past_comes_in_slices_and_not_faster_than_it_is_read(bench: Bench) -> None:
    founder, late = Connection(), Connection()
    room = bench.found(founder)
    said = say(room, *range(2 * EVENTS_AT_A_TIME + 10))
    bench.attach(late)
    assert bench.rooms.busy
    bench.rooms.pump()
    assert len(late.events) == EVENTS_AT_A_TIME
    late.pending = bytearray(one_room.MAX_PENDING_BYTES)
    assert not bench.rooms.busy
    bench.rooms.pump()
    assert len(late.events) == EVENTS_AT_A_TIME
    late.pending = bytearray()
    said += say(room, 7)
    bench.rooms.pump()
    bench.rooms.pump()
    assert not bench.rooms.busy
    said += say(room, 8)
    assert late.take() == renamed(said, "a")


def test_the_end_of_a_reading_ends_nothing_else(bench: Bench) -> None:
    founder, other = Connection(), Connection()
    room = bench.found(founder)
    bench.attach(other)
    bench.rooms.pump()
    assert bench.rooms.cancel(other, Cancel(id="a"))
    say(room, 1)
    assert other.take() == []
    assert len(founder.take()) == 1
    bench.rooms.client_gone(founder)
    say(room, 2)
    assert bench.cancels == []
    assert bench.is_kept()


def test_a_choice_that_a_reader_has_enough_of_ends_for_all(bench: Bench) -> None:
    founder, other = Connection(), Connection()
    room = bench.found(founder, n=2)
    bench.attach(other)
    bench.rooms.pump()
    bench.rooms.cancel(founder, Cancel(id="r", choice=1))
    bench.rooms.cancel(other, Cancel(id="a", choice=1))
    assert bench.cancels == [Cancel(id="r", choice=1)]
    assert other.take() == [Output(id="a", choice=1, finish_reason="length", cut=True)]
    bench.rooms.cancel(other, Cancel(id="a", choice=0))
    assert room.ended
    late = Connection()
    bench.attach(late, alias="b")
    bench.rooms.pump()
    ends = [Output(id="b", choice=choice, finish_reason="length", cut=True) for choice in (1, 0)]
    assert late.take() == ends


def test_what_is_no_reading_is_left_to_the_broker(bench: Bench) -> None:
    assert not bench.rooms.cancel(Connection(), Cancel(id="r"))
    bench.found(Connection())
    assert not bench.rooms.cancel(Connection(), Cancel(id="r"))


def test_without_readers_a_request_goes_on_for_the_window(bench: Bench) -> None:
    founder = Connection()
    bench.found(founder)
    bench.rooms.client_gone(founder)
    bench.later(WINDOW_S - 1)
    assert bench.cancels == []
    reader = Connection()
    assert bench.attach(reader).request
    bench.later(10 * WINDOW_S)
    assert bench.cancels == []
    bench.rooms.client_gone(reader)
    bench.later(WINDOW_S - 1)
    assert bench.cancels == []
    bench.later(2)
    assert bench.cancels == [Cancel(id="r")]
    assert not bench.is_kept()
    assert len(bench.rooms) == 0


def test_what_has_ended_can_be_read_for_the_window_and_then_no_more(bench: Bench) -> None:
    founder = Connection()
    room = bench.found(founder)
    said = say(room, 1, 2) + finish(room)
    bench.later(0)
    bench.later(WINDOW_S - 1)
    late = Connection()
    bench.attach(late)
    bench.rooms.pump()
    assert late.take() == renamed(said, "a")
    bench.later(2)
    assert not bench.is_kept()


def test_nobody_else_finds_it(bench: Bench) -> None:
    bench.found(Connection(), key="k")
    assert bench.attach(Connection(), owner="bob").request == ""
    assert bench.attach(Connection(), request="other").request == ""
    bobs = bench.rooms.keep(Connection(), Keep(id="b", owner="bob", key="k"))
    assert bobs.request == "b"


def test_a_key_leads_to_the_request_that_has_it(bench: Bench) -> None:
    first = bench.found(Connection(), key="k", digest=b"1", note=b"note")
    again = bench.rooms.keep(Connection(), Keep(id="s", owner="ann", key="k", digest=b"2"))
    assert again == Kept(id="s", request="r", digest=b"1")
    assert bench.attach(Connection()) == Kept(id="a", request="r", digest=b"1", note=b"note")
    assert len(bench.rooms) == 1
    finish(first)
    bench.later(0)
    assert bench.rooms.keep(Connection(), Keep(id="s", owner="ann", key="k")).request == "r"


@pytest.mark.parametrize("tended", [False, True])
def test_a_key_of_what_failed_is_free_again_and_the_failure_can_be_read(bench: Bench, tended: bool) -> None:
    room = bench.found(Connection(), key="k")
    said = say(room, 1)
    failure = Failed(id="r", kind="internal", message="no")
    room.post(failure)
    room.jobs.clear()
    if tended:
        bench.later(0)
    assert bench.rooms.keep(Connection(), Keep(id="s", owner="ann", key="k")).request == "s"
    late = Connection()
    assert bench.attach(late).request == "r"
    bench.rooms.pump()
    assert late.take() == renamed([*said, failure], "a")


def test_what_failed_before_a_word_is_forgotten_at_once(bench: Bench) -> None:
    room = bench.found(Connection(), key="k")
    room.post(Failed(id="r", kind="overloaded", message="full"))
    room.jobs.clear()
    bench.later(0)
    assert len(bench.rooms) == 0


def test_one_failed_job_ends_the_others_of_its_request(bench: Bench) -> None:
    room = bench.found(Connection(), jobs=2)
    room.post(Output(id="r/1", ids=[1]))
    room.post(Failed(id="r/0", kind="internal", message="no"))
    del room.jobs["r/0"]
    bench.later(0)
    assert bench.cancels == [Cancel(id="r/1")]


def test_a_founder_without_jobs_leaves_nothing_behind_and_tells_who_waits(bench: Bench) -> None:
    founder, joined = Connection(), Connection()
    bench.rooms.keep(founder, Keep(id="r", owner="ann", key="k"))
    bench.attach(joined)
    bench.rooms.pump()
    bench.rooms.cancel(founder, Cancel(id="r"))
    (told,) = joined.take()
    assert isinstance(told, Failed)
    assert told.id == "a"
    assert len(bench.rooms) == 0
    assert bench.rooms.keep(founder, Keep(id="s", owner="ann", key="k")).request == "s"


def test_without_a_window_nothing_is_kept(bench: Bench) -> None:
    closed = Rooms(bench, window_s=0, clock=lambda: 0.0)
    assert closed.keep(Connection(), Keep(id="r", owner="ann")).request == ""


def test_rooms_are_bounded_and_the_oldest_ended_one_of_who_has_most_goes_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROOMS", 4)
    readers = Connection()
    for request, owner in (("b", "bob"), ("a0", "ann"), ("a1", "ann"), ("a2", "ann")):
        room = bench.found(readers, request, owner=owner)
        if request != "a0":
            finish(room)
    bench.later(0)
    readers.take()
    assert bench.found(readers, "new", owner="eve")
    assert not bench.is_kept("a1")
    assert all(bench.is_kept(request) for request in ("a0", "a2"))
    assert bench.attach(Connection(), "b", owner="bob").request == "b"


def test_if_all_are_running_there_is_no_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROOMS", 1)
    bench.found(Connection())
    assert bench.rooms.keep(Connection(), Keep(id="s", owner="ann")).request == ""


def test_bytes_of_all_rooms_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for request in ("old", "new"):
        room = bench.found(Connection(), request)
        say(room, *range(100))
        finish(room)
    bench.later(0)
    monkeypatch.setattr(module, "MAX_BYTES", room.bytes + 1)
    bench.later(0)
    assert not bench.is_kept("old")
    assert bench.is_kept("new")


def scores(count: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(-1.0, [(token, -1.0) for token in range(20)])] * count


LARGE: list[Callable[[], Event]] = [
    lambda: Output(id="r", ids=[1]),
    lambda: Output(id="r", ids=[1] * 10, logprobs=scores(10)),
    lambda: Embedded(id="r", vector=b"\0" * 10_000),
]


@pytest.mark.parametrize("make", LARGE)
def test_what_grows_too_large_is_read_on_but_not_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Event]
) -> None:
    monkeypatch.setattr(one_room, "MAX_ROOM_BYTES", 100_000)
    founder, behind = Connection(), Connection()
    room = bench.found(founder, key="k")
    count = 0
    while not room.overflown:
        if count == 1:
            bench.attach(behind)
        room.post(make())
        count += 1
        assert count < 1000
    assert len(founder.take()) == count
    assert isinstance(behind.take()[-1], Failed)
    say(room, 1)
    assert len(founder.take()) == 1
    assert (room.log, room.note, room.bytes) == ([], b"", 0)
    assert bench.attach(Connection()).request == ""
    assert bench.rooms.keep(Connection(), Keep(id="s", owner="ann", key="k")).request == "s"
    bench.rooms.client_gone(founder)
    assert Cancel(id="r") in bench.cancels


def test_who_is_behind_when_it_is_forgotten_still_gets_all_of_it(bench: Bench) -> None:
    founder, late = Connection(), Connection()
    room = bench.found(founder)
    said = say(room, *range(EVENTS_AT_A_TIME + 10)) + finish(room)
    bench.later(0)
    bench.attach(late)
    bench.rooms.pump()
    bench.later(WINDOW_S + 1)
    assert len(bench.rooms) == 0
    bench.rooms.pump()
    assert late.take() == renamed(said, "a")
    assert not bench.rooms.cancel(late, Cancel(id="a"))


def test_many_who_begin_to_read_at_once_are_told_what_one_after_the_other(bench: Bench) -> None:
    founder, here, there = Connection(), Connection(), Connection()
    bench.found(founder, note=b"x" * 1000)
    for connection, alias in ((here, "a"), (here, "b"), (here, "c"), (there, "d")):
        bench.rooms.attach(connection, Attach(alias=alias, request="r", owner="ann"))
    assert here.take() == []
    for aliases in ("a", "b", "c"):
        bench.rooms.pump()
        assert [event.id for event in here.take()] == [aliases]
    assert [event.id for event in there.take()] == ["d"]
    bench.rooms.pump()
    bench.rooms.pump()
    bench.rooms.pump()
    assert not bench.rooms.busy
    assert founder.take() == []


def test_who_has_much_to_read_is_told_nothing_yet(bench: Bench) -> None:
    bench.found(Connection(), note=b"x")
    late = Connection()
    late.pending = bytearray(one_room.MAX_PENDING_BYTES)
    bench.rooms.attach(late, Attach(alias="a", request="r", owner="ann"))
    bench.rooms.pump()
    assert late.take() == []
    late.pending.clear()
    bench.rooms.pump()
    assert late.take() == [Kept(id="a", request="r", note=b"x")]


def test_what_is_asked_for_with_very_much_is_not_kept(bench: Bench) -> None:
    bench.found(Connection(), note=bytes(module.MAX_NOTE_BYTES))
    assert (
        bench.rooms.keep(Connection(), Keep(id="s", owner="ann", note=bytes(module.MAX_NOTE_BYTES + 1))).request == ""
    )


def test_one_who_has_not_been_told_yet_that_it_can_be_read_is_told_that_it_cannot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_room, "MAX_ROOM_BYTES", 1000)
    room = bench.found(Connection())
    late = Connection()
    bench.rooms.attach(late, Attach(alias="a", request="r", owner="ann"))
    say(room, *range(10))
    bench.rooms.pump()
    assert late.take() == [Kept(id="a", request="")]


def test_readers_whose_connection_has_much_to_read_fall_behind_and_miss_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_room, "MAX_PENDING_EVENTS", 5)
    founder, late = Connection(), Connection()
    room = bench.found(founder)
    bench.attach(late)
    bench.rooms.pump()
    said = say(room, *range(20))
    assert (len(founder.take()), len(late.events)) == (20, 5)
    heard = late.take()
    late.pending = bytearray(one_room.MAX_PENDING_BYTES)
    said += say(room, 20) + finish(room)
    assert late.take() == []
    late.pending.clear()
    assert bench.rooms.busy
    bench.rooms.pump()
    assert heard + late.take() == renamed(said, "a")


def test_a_large_event_is_told_to_one_reader_after_the_other(bench: Bench) -> None:
    founder, readers = Connection(), Connection()
    room = bench.found(founder)
    for alias in ("a", "b", "c"):
        bench.attach(readers, alias=alias)
        bench.rooms.pump()
    large = Output(id="r", ids=[1] * 30, logprobs=scores(30))
    room.post(large)
    small = say(room, 1)
    assert founder.take() == [large, *small]
    for alias in ("a", "b", "c"):
        bench.rooms.pump()
        assert readers.take() == renamed([large], alias)
    for alias in ("a", "b", "c"):
        bench.rooms.pump()
        assert readers.take() == renamed(small, alias)
    assert not bench.rooms.busy


def test_a_request_whose_first_job_has_ended_has_not_ended_before_the_others_have_come(bench: Bench) -> None:
    founder = Connection()
    bench.rooms.keep(founder, Keep(id="r", owner="ann", jobs=2))
    room = bench.bring(founder, "r/0")
    assert room is not None
    room.jobs.clear()
    bench.later(0)
    assert not room.ended
    assert bench.bring(founder, "r/1") is room
    room.jobs.clear()
    assert room.ended


def test_a_job_that_comes_behind_the_failure_of_another_one_has_no_room(bench: Bench) -> None:
    founder = Connection()
    bench.rooms.keep(founder, Keep(id="r", owner="ann", jobs=3))
    room = bench.bring(founder, "r/0")
    assert room is not None
    room.post(Failed(id="r/0", kind="overloaded", message="full"))
    room.jobs.clear()
    assert bench.bring(founder, "r/1") is None
    bench.later(0)
    assert bench.bring(founder, "r/2") is None
    bench.later(0)
    assert len(bench.rooms) == 0
    assert bench.bring(founder, "r/3") is None


def test_a_founder_that_is_gone_before_all_jobs_have_come_leaves_none_of_them(bench: Bench) -> None:
    founder, other = Connection(), Connection()
    bench.rooms.keep(founder, Keep(id="r", owner="ann", jobs=2))
    bench.bring(founder, "r/0")
    bench.attach(other)
    bench.rooms.pump()
    bench.rooms.client_gone(founder)
    assert bench.cancels == [Cancel(id="r/0")]
    assert len(bench.rooms) == 0
    (told,) = other.take()
    assert isinstance(told, Failed)


@pytest.mark.parametrize("read", [False, True])
def test_when_its_time_is_over_what_has_begun_ends_where_it_is_with_or_without_a_reader(
    bench: Bench, read: bool
) -> None:
    founder = Connection()
    room = bench.found(founder, jobs=2, n=2, seconds=20.0)
    for job_id, entry in room.jobs.items():
        entry.accept(Output(id=job_id, choice=0, ids=[1], finish_reason="stop" if job_id == "r/0" else None))
    first = [Output(id="r/0", ids=[1], finish_reason="stop"), Output(id="r/1", ids=[1])]
    for event in first:
        room.post(event)
    if not read:
        bench.rooms.client_gone(founder)
    bench.later(19)
    assert bench.cancels == []
    bench.later(1)
    cut = [("r/0", 1), ("r/1", 0), ("r/1", 1)]
    assert bench.cancels == [Cancel(id=job_id, choice=choice) for job_id, choice in cut]
    assert room.ended
    ends = [Output(id=job_id, choice=choice, finish_reason="length", cut=True) for job_id, choice in cut]
    late = Connection()
    bench.attach(late)
    bench.rooms.pump()
    assert late.take() == renamed([*first, *ends], "a")


def test_when_its_time_is_over_what_has_not_begun_fails(bench: Bench) -> None:
    founder = Connection()
    room = bench.found(founder, jobs=2, seconds=20.0)
    bench.later(20)
    assert bench.cancels == [Cancel(id="r/0"), Cancel(id="r/1")]
    (told,) = founder.take()
    assert isinstance(told, Failed)
    assert (told.kind, told.cause) == ("overloaded", "queue_time")
    assert room.ended
    assert len(bench.rooms) == 0


def test_an_owner_has_no_more_requests_that_go_on_than_it_may(bench: Bench) -> None:
    first = bench.found(Connection(), "a", most=2)
    bench.found(Connection(), "b", most=2)
    bench.found(Connection(), "other", owner="bob", most=2)
    assert bench.rooms.keep(Connection(), Keep(id="c", owner="ann", most=2)).request == ""
    finish(first)
    assert bench.rooms.keep(Connection(), Keep(id="c", owner="ann", most=2)).request == "c"
    assert bench.rooms.keep(Connection(), Keep(id="d", owner="ann")).request == "d"
