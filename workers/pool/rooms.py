"""Requests that outlive their clients, all of them: founded, read, ended in time, and forgotten."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from config import logs
from workers.messages import Attach, Cancel, Failed, GenerateJob, Keep, Kept, Output
from workers.pool.deadlines import TOO_LATE
from workers.pool.journal import Entry
from workers.pool.room import Reader, Reading, Room, is_full

log = logs.logger("tailrace.pool")

MAX_ROOMS = 1024
# Of all rooms together: what their notes and events take, about.
MAX_BYTES = 256 * 1024 * 1024
# The text side keeps the whole request in its note. What is larger is answered once.
MAX_NOTE_BYTES = 2 * 1024 * 1024
GIVEN_UP = "The request was given up; send it again."


class Jobs(Protocol):
    """The side of the broker that a room needs."""

    def cancel(self, client: Room, cancel: Cancel) -> None: ...
    def client_gone(self, client: Room) -> None: ...


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
        return any(not is_full(reading.connection) for reading in self._behind)

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
            if reading.connection in served or is_full(reading.connection):
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
            largest.overflow()
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
