"""One request that outlives its client: what its jobs produce is written down, and told to all who read it.

A `Room` stands between the journal and the connections: to the broker it is a client like any other. Whoever reads a
room gets the very events that the first reader got, one by one, so that what the text side makes of them is the same.
"""

import math
from collections.abc import Callable
from typing import Protocol

import msgspec

from workers.messages import Embedded, Event, Failed, Keep, Kept, Output, PromptLogprobs, Queued
from workers.pool.journal import Entry

# What one takes. A reader far behind has all of it waiting on the text side.
MAX_ROOM_BYTES = 64 * 1024 * 1024
# What one of those who are behind is given in one turn of the pool's loop: one on each connection, for all that a turn
# has for a connection is one frame.
EVENTS_AT_A_TIME = 512
# Who has so much waiting, in bytes to be written and in events of this turn, is not given any more: readers fall behind
# and are told the rest later.
MAX_PENDING_BYTES = 1024 * 1024
MAX_PENDING_EVENTS = 4096
# An event of so many bytes is not told to all readers in the same turn.
LARGE_EVENT_BYTES = 64 * 1024

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


def is_full(connection: Reader) -> bool:
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
            if reading.is_founders or not (size >= LARGE_EVENT_BYTES or is_full(reading.connection)):
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
                self.overflow()
        return size

    def overflow(self) -> None:
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
