"""Requests that outlive their clients: what their jobs produce is written down, and can be read from the start.

A `Room` stands between the journal and the connections: to the broker it is a client like any other. Whoever reads a
room gets the very events that the first reader got, one by one, so that what the text side makes of them is the same.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import msgspec

from config import logs
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
    PromptLogprobs,
    Queued,
)
from workers.pool.deadlines import TOO_LATE
from workers.pool.journal import Entry

log = logs.logger("tailrace.pool")

MAX_ROOMS = 1024
# Of all rooms together: what their notes and events take, about.
MAX_BYTES = 256 * 1024 * 1024
# Of one of them. A reader far behind has all of it waiting on the text side.
MAX_ROOM_BYTES = 64 * 1024 * 1024
# The text side keeps the whole request in its note. What is larger is answered once.
MAX_NOTE_BYTES = 2 * 1024 * 1024
# What one of those who are behind is given in one turn of the pool's loop: one on each connection, for all that a turn
# has for a connection is one frame.
EVENTS_AT_A_TIME = 512
# Who has so much waiting, in bytes to be written and in events of this turn, is not given any more: readers fall behind
# and are told the rest later.
MAX_PENDING_BYTES = 1024 * 1024
MAX_PENDING_EVENTS = 4096
# An event of so many bytes is not told to all readers in the same turn.
LARGE_EVENT_BYTES = 64 * 1024

GIVEN_UP = "The request was given up; send it again."

# About what an event takes in this process, and each log-probability in it.
_EVENT_BYTES = 320
_SCORE_BYTES = 120


class Reader(Protocol):
    """The connection of somebody who reads. ``pending`` are bytes that wait to be written to it, ``events`` those that
    were posted in this turn.
    """

    pending: bytearray
    events: list[Event]

    def post(self, event: Event) -> None: ...


class Jobs(Protocol):
    """The side of the broker that a room needs."""

    def cancel(self, client: "Room", cancel: Cancel) -> None: ...
    def client_gone(self, client: "Room") -> None: ...


def _is_full(connection: Reader) -> bool:
    """Whether so much waits for it that the rest should wait here."""
    return len(connection.pending) >= MAX_PENDING_BYTES or len(connection.events) >= MAX_PENDING_EVENTS


class Reading:
    """Somebody reads ``room`` on ``connection``, where its events have ``alias`` in place of the request's id.

    ``greeted``: whether it has been told what it reads, before which there is nothing to be read.
    """

    __slots__ = ("alias", "at", "behind", "connection", "greeted", "room")

    def __init__(self, room: "Room", connection: Reader, alias: str) -> None:
        self.room = room
        self.connection = connection
        self.alias = alias
        # How many events of the log it has, as long as it has not caught up.
        self.at = 0
        self.behind = False
        self.greeted = True

    @property
    def is_founders(self) -> bool:
        """Whether it is that of who asked: it is told everything at once, as by requests that are not kept."""
        return self.alias == self.room.id

    def tell(self, event: Event) -> None:
        """Send an event under the reader's name for it."""
        request = self.room.id
        if self.alias != request:
            event = msgspec.structs.replace(event, id=self.alias + event.id[len(request) :])
        self.connection.post(event)

    def catch_up(self) -> bool:
        """Send the next part of what it has missed; return whether it has everything now."""
        room = self.room
        if not self.greeted:
            # In a turn of its own: it may be large.
            self.greeted = True
            self.connection.post(Kept(id=self.alias, request=room.id, digest=room.digest, note=room.note))
            return False
        part = room.log[self.at : self.at + EVENTS_AT_A_TIME]
        large = next((place for place, event in enumerate(part) if _size(event) >= LARGE_EVENT_BYTES), None)
        if large is not None:
            part = part[: large + 1]
        for event in part:
            self.tell(event)
        self.at += len(part)
        self.behind = self.at < len(room.log)
        return not self.behind


class Room:
    """One kept request, as the broker's client: ``jobs`` are those of its jobs that live, ``expected`` how many more
    its founder is going to bring.

    ``lonely_since``: when its last reader left; ``ended_at``: when its last job ended; None as long as that is not so.
    """

    def __init__(self, keep: Keep, found_by: Reader, fell_behind: Callable[[Reading], None], now: float) -> None:
        self.id = keep.id
        self.over_at = now + keep.seconds if keep.seconds else math.inf
        self._fell_behind = fell_behind
        self.owner = keep.owner
        self.key = keep.key
        self.digest = keep.digest
        self.note = keep.note
        self.jobs: dict[str, Entry] = {}
        self.expected = keep.jobs
        self.log: list[Event] = []
        self.bytes = len(keep.note) + _EVENT_BYTES
        self.readings: list[Reading] = [Reading(self, found_by, keep.id)]
        self.failed = False
        self.overflown = False
        self.lonely_since: float | None = None
        self.ended_at: float | None = None

    @property
    def ended(self) -> bool:
        """Whether all has been said."""
        return not self.expected and not self.jobs

    def post(self, event: Event) -> None:
        """Write an event down, and pass it on to those who have all that came before it."""
        size = 0
        if type(event) is not Queued:
            size = self._write_down(event)
        for reading in list(self.readings):
            if reading.behind:
                continue
            if reading.is_founders or not (size >= LARGE_EVENT_BYTES or _is_full(reading.connection)):
                reading.tell(event)
            elif self.overflown:
                self._send_away(reading)
            elif size:
                reading.behind = True
                reading.at = len(self.log) - 1
                self._fell_behind(reading)

    def _write_down(self, event: Event) -> int:
        """Return what the event takes, about, in bytes."""
        if type(event) is Failed:
            self.failed = True
        size = _size(event)
        if not self.overflown:
            self.log.append(event)
            self.bytes += size
            if self.bytes > MAX_ROOM_BYTES:
                self._overflow()
        return size

    def _overflow(self) -> None:
        """Too much to keep: those who have all of it read on, and nobody can begin any more."""
        self.overflown = True
        self.log.clear()
        self.note = b""
        self.bytes = 0
        for reading in [reading for reading in self.readings if reading.behind]:
            self._send_away(reading)

    def _send_away(self, reading: Reading) -> None:
        """What it has not read is not here any more."""
        reading.behind = False
        if reading.greeted:
            reading.tell(Failed(id=self.id, kind="internal", message="The answer is too long to be read again."))
        else:
            reading.connection.post(Kept(id=reading.alias, request=""))
        self.readings.remove(reading)


def _size(event: Event) -> int:
    """About what the event takes, in bytes."""
    size = _EVENT_BYTES
    if isinstance(event, Output | PromptLogprobs):
        if event.logprobs:
            size += _SCORE_BYTES * sum(1 + len(scores.top) for scores in event.logprobs)
    elif isinstance(event, Embedded):
        size += len(event.vector)
    return size


class Rooms:
    """All kept requests. ``window_s``: how long one goes on without a reader, and how long one that has ended is kept.

    Without a window nothing is kept.
    """

    def __init__(self, jobs: Jobs, *, window_s: float, clock: Callable[[], float]) -> None:
        self._broker = jobs
        self._window_s = window_s
        self._clock = clock
        # In the order in which they were founded.
        self._rooms: dict[str, Room] = {}
        self._keys: dict[tuple[str, str], Room] = {}
        self._readings: dict[Reader, dict[str, Reading]] = {}
        self._behind: list[Reading] = []

    def __len__(self) -> int:
        return len(self._rooms)

    # --- from the clients ---------------------------------------------------------------------------------------------

    def keep(self, client: Reader, keep: Keep) -> Kept:
        """Found a room, whose first reader ``client`` is, or say which one has the key."""
        known = self._keys.get((keep.owner, keep.key)) if keep.key else None
        if known is not None and (known.failed or known.overflown):
            self._settle(known)
        elif known is not None:
            return Kept(id=keep.id, request=known.id, digest=known.digest)
        too_much = len(keep.note) > MAX_NOTE_BYTES or self._has_enough(keep)
        if self._window_s <= 0 or too_much or keep.id in self._rooms or not self._make_place():
            return Kept(id=keep.id, request="")
        room = Room(keep, client, lambda reading: self._behind.append(reading), self._clock())
        self._rooms[room.id] = room
        if room.key:
            self._keys[room.owner, room.key] = room
        self._readings.setdefault(client, {})[room.id] = room.readings[0]
        return Kept(id=keep.id, request=room.id)

    def attach(self, client: Reader, attach: Attach) -> None:
        """Let ``client`` read a room from its first event on; one of another owner is none."""
        room = self._rooms.get(attach.request)
        taken = attach.alias in self._readings.get(client, ())
        if room is None or room.owner != attach.owner or room.overflown or taken:
            client.post(Kept(id=attach.alias, request=""))
            return
        reading = Reading(room, client, attach.alias)
        reading.behind, reading.greeted = True, False
        room.readings.append(reading)
        room.lonely_since = None
        self._readings.setdefault(client, {})[attach.alias] = reading
        self._behind.append(reading)

    def room_for(self, client: Reader, job: GenerateJob) -> Room | None:
        """Return the room that ``client`` founded for the request that ``job`` is the next of, as who submits it.

        None if there is none any more, or one of its jobs has failed: then nobody wants this one.
        """
        reading = self._readings.get(client, {}).get(job.kept)
        if reading is None or not reading.is_founders or reading.room.expected <= 0:
            return None
        reading.room.expected -= 1
        return None if reading.room.failed else reading.room

    def cancel(self, client: Reader, cancel: Cancel) -> bool:
        """End a reading, or a choice of the request; return False if it is none of this client's readings.

        A choice ends for all who read, for they all find the same reason for it. The log says so, in case that they do
        not: where the request's time was over.
        """
        alias, slash, place = cancel.id.partition("/")
        reading = self._readings.get(client, {}).get(alias)
        if reading is None:
            return False
        room = reading.room
        if cancel.choice is None:
            self._end_reading(reading)
            return True
        entry = room.jobs.get(room.id + slash + place)
        if entry is not None:
            self._cut(room, entry, cancel.choice)
        return True

    def _cut(self, room: Room, entry: Entry, choice: int) -> None:
        """End a choice where it is."""
        if choice not in entry.finished:
            job_id = entry.job.id
            self._broker.cancel(room, Cancel(id=job_id, choice=choice))
            room.post(Output(id=job_id, choice=choice, finish_reason="length", cut=True))

    def _end_time(self, room: Room) -> None:
        """The request's time is over. Its readers, if it has any, find so too; they do the same."""
        room.over_at = math.inf
        if any(entry.started for entry in room.jobs.values()) or any(type(event) is Output for event in room.log):
            for entry in list(room.jobs.values()):
                for choice in range(len(entry.emitted)):
                    self._cut(room, entry, choice)
        elif room.jobs:
            name = next(iter(room.jobs))
            self._broker.client_gone(room)
            room.post(Failed(id=name, kind="overloaded", message=TOO_LATE, cause="queue_time"))

    def client_gone(self, client: Reader) -> None:
        """The connection is closed, and with it all that was read there."""
        for reading in list(self._readings.get(client, {}).values()):
            self._end_reading(reading)

    # --- each turn ----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether somebody who reads has not caught up and could be given more."""
        return any(not _is_full(reading.connection) for reading in self._behind)

    def pump(self) -> None:
        """Give those who are behind more of what they have missed: one on each connection, who is the last then."""
        if not self._behind:
            return
        served: set[Reader] = set()
        waiting: list[Reading] = []
        go_on: list[Reading] = []
        for reading in self._behind:
            if not reading.behind:
                continue
            if reading.connection in served or _is_full(reading.connection):
                waiting.append(reading)
            else:
                served.add(reading.connection)
                if not self._catch_up(reading):
                    go_on.append(reading)
        self._behind = waiting + go_on

    def _catch_up(self, reading: Reading) -> bool:
        done = reading.catch_up()
        if done and reading.room.id not in self._rooms:
            self._drop(reading)
        return done

    def tend(self, now: float) -> None:
        """Cancel what nobody has read for too long, and forget what ended long ago."""
        bytes_kept = 0
        for room in list(self._rooms.values()):
            if room.failed and room.jobs:
                # One job's failure is the end of the whole request.
                self._broker.client_gone(room)
            if now >= room.over_at:
                self._end_time(room)
            if room.ended and room.ended_at is None:
                room.ended_at = now
                self._settle(room)
            lonely, ended = room.lonely_since, room.ended_at
            if ended is not None:
                if now - ended >= self._window_s:
                    self._forget(room)
            elif lonely is not None and now - lonely >= self._window_s:
                log.info("nobody came back for a kept request: cancelled", seconds=self._window_s)
                self._forget(room)
            bytes_kept += room.bytes
        while bytes_kept > MAX_BYTES and (oldest := self._oldest_ended()) is not None:
            bytes_kept -= oldest.bytes
            self._forget(oldest)
        if bytes_kept > MAX_BYTES:
            largest = max(self._rooms.values(), key=lambda room: room.bytes)
            largest._overflow()
            self._settle(largest)

    # --- beginnings and ends ------------------------------------------------------------------------------------------

    def _settle(self, room: Room) -> None:
        """What failed, or cannot be read, gives its key up: who asks again shall get an answer."""
        if (room.failed or room.overflown) and self._keys.get((room.owner, room.key)) is room:
            del self._keys[room.owner, room.key]
        nothing_said = not any(type(event) is Output for event in room.log)
        if (room.overflown and not room.readings) or (room.failed and nothing_said):
            self._forget(room)

    def _end_reading(self, reading: Reading) -> None:
        room = reading.room
        own = self._readings[reading.connection]
        del own[reading.alias]
        if not own:
            del self._readings[reading.connection]
        reading.behind = False
        if reading in room.readings:
            room.readings.remove(reading)
        if room.expected:
            # Its founder was refused, or is gone, before it had asked everything.
            if reading.is_founders:
                self._forget(room)
        elif not room.readings:
            room.lonely_since = self._clock()
            if room.overflown:
                self._forget(room)

    def _forget(self, room: Room) -> None:
        """The end of a room: its jobs are cancelled, and who still reads is told."""
        if self._rooms.pop(room.id, None) is None:
            return
        if self._keys.get((room.owner, room.key)) is room:
            del self._keys[room.owner, room.key]
        if not room.ended:
            room.post(Failed(id=room.id, kind="unavailable", message=GIVEN_UP))
        self._broker.client_gone(room)
        for reading in room.readings:
            if not reading.behind:
                self._drop(reading)
        room.readings = [reading for reading in room.readings if reading.behind]

    def _drop(self, reading: Reading) -> None:
        own = self._readings.get(reading.connection, {})
        if own.get(reading.alias) is reading:
            del own[reading.alias]
            if not own:
                del self._readings[reading.connection]

    def _has_enough(self, keep: Keep) -> bool:
        """Whether the owner has as many that go on as it may: the door counts only those that have a client."""
        if not keep.most:
            return False
        return sum(room.owner == keep.owner and not room.ended for room in self._rooms.values()) >= keep.most

    def _make_place(self) -> bool:
        """Return whether another room may be founded, for which one that has ended may have to go."""
        if len(self._rooms) < MAX_ROOMS:
            return True
        oldest = self._oldest_ended()
        if oldest is None:
            return False
        self._forget(oldest)
        return True

    def _oldest_ended(self) -> Room | None:
        """Return the oldest room that has ended, of the owner who has most of them."""
        ended = [room for room in self._rooms.values() if room.ended and not any(r.behind for r in room.readings)]
        if not ended:
            return None
        most = Counter(room.owner for room in ended).most_common(1)[0][0]
        return next(room for room in ended if room.owner == most)
