"""The events of one request, as they come from the pool."""

import time
from collections.abc import Callable
from typing import Protocol

from app.bell import Bell
from app.text.errors import JobFailed, PoolUnavailable, ReaderTooSlow
from app.text.offload import give_way
from app.timings import Timings
from workers.messages import (
    Attach,
    Cancel,
    ClientMessage,
    Embedded,
    Event,
    Failed,
    GenerateJob,
    Job,
    Keep,
    Kept,
    Output,
    Started,
)

# Of a kept request all that has been said so far comes at once; the pool bounds how much that can be.
MAX_PENDING_OF_READING = 1 << 18
# Of all requests of this process together, for a reading that has more waiting than any other request may have: many
# readers of long answers who do not read would take all memory. It is looked at every so many events.
MAX_PENDING_OF_ALL = 1 << 19
LOOK_EVENTS = 4096
# A few milliseconds' work.
EVENTS_AT_A_TIME = 256


class Line(Protocol):
    """The connection to the pool, as its streams see it."""

    @property
    def timings(self) -> Timings: ...
    def post(self, message: ClientMessage, stream: "Stream", name: str) -> None: ...
    def tell(self, message: Cancel) -> None: ...
    def forget(self, name: str) -> None: ...
    def pending_events(self) -> int: ...


class Stream:
    """The events of one request, which may have several jobs. Always close it: that cancels what is unfinished.

    Of a kept request (`keep`) and one that is read again (`attach`), closing ends only the reading.
    """

    def __init__(self, client: Line, max_pending: int) -> None:
        self._client = client
        self._max_pending = max_pending
        self._events: list[Event] = []
        self._bell = Bell()
        self._error: BaseException | None = None
        # For each unfinished job the choices that are still growing.
        self._open: dict[str, set[int]] = {}
        # Whose waits are noted; None for a stream that tells what has been told before.
        self.timings: Timings | None = client.timings
        # Of `time.monotonic`; 0: not yet.
        self.begun_at = time.monotonic()
        self.started_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.on_first_token: Callable[[], None] | None = None
        # The name under which a kept request is read, and whether its answer was not read to the end.
        self._reading = ""
        self.left_behind = False
        # How the pool ended a job of it, if it did not finish it.
        self.failure: Failed | None = None

    @property
    def error(self) -> BaseException | None:
        """What it was ended with, if it was."""
        return self._error

    @property
    def failed(self) -> bool:
        """Whether the pool failed it, or went away."""
        return self.failure is not None or isinstance(self._error, JobFailed)

    @property
    def unfinished(self) -> bool:
        """Whether it has jobs that have not come to their end."""
        return bool(self._open)

    @property
    def goes_on(self) -> bool:
        """Whether its closing ends only the reading."""
        return bool(self._reading) or self.left_behind

    def submit(self, job: Job) -> None:
        """Hand a job to the pool. Raises `PoolUnavailable` if there is none, or what `abort` was given."""
        if self._error is not None:
            raise self._error
        self._client.post(job, self, job.id)
        self._open[job.id] = set(range(job.n)) if isinstance(job, GenerateJob) else {0}

    def keep(self, keep: Keep, timeout: float) -> Kept:
        """Ask the pool to keep the request; its answer says which request has this key.

        If it is the same one, the jobs come next, through `submit`. Raises `PoolUnavailable`, or what `abort` was
        given.
        """
        kept = self._ask(keep, keep.id, timeout)
        if kept.request != keep.id:
            self._reading = ""
            self._client.forget(keep.id)
        return kept

    def attach(self, attach: Attach, timeout: float) -> Kept:
        """Read a kept request from its first event on, under a name of one's own; ``request`` "" if there is none.

        Raises `PoolUnavailable`, or what `abort` was given.
        """
        before = self.timings, self._max_pending
        self.timings, self._max_pending = None, MAX_PENDING_OF_READING
        kept = self._ask(attach, attach.alias, timeout)
        if not kept.request:
            self._reading = ""
            self._client.forget(attach.alias)
            # It may yet be the first to tell something.
            self.timings, self._max_pending = before
        return kept

    def _ask(self, message: Keep | Attach, name: str, timeout: float) -> Kept:
        if self._error is not None:
            raise self._error
        self._client.post(message, self, name)
        self._reading = name
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            events = self.get(left)
            if events:
                # Nothing of a request comes before the answer to this.
                kept, *rest = events
                assert isinstance(kept, Kept)
                self.unget(rest)
                return kept
        raise PoolUnavailable("The model pool does not answer at the moment.")

    def get(self, timeout: float | None = None) -> list[Event]:
        """Return the events that have come, waiting for the first; [] after ``timeout`` seconds without one.

        Of very many only the first ones: what follows from them is work, and others want their turn. Raises what
        `abort` was given, or `ReaderTooSlow` if they were not taken for too long.
        """
        if self._error is None and not self._events:
            self._bell.wait(timeout)
        if self._error is not None:
            raise self._error
        events, self._events = self._events, []
        if len(events) > EVENTS_AT_A_TIME:
            self._events = events[EVENTS_AT_A_TIME:]
            events = events[:EVENTS_AT_A_TIME]
            give_way()
        return events

    def unget(self, events: list[Event]) -> None:
        """Give ``events`` back, to be the next ones."""
        self._events[:0] = events

    @property
    def pending(self) -> int:
        """How many events wait to be taken."""
        return len(self._events)

    def end_choice(self, job_id: str, choice: int) -> None:
        """No more tokens of this choice are wanted."""
        growing = self._open.get(job_id)
        if self._reading:
            # For all who read it, since they all find the same end.
            if growing is not None:
                growing.discard(choice)
                if not growing:
                    del self._open[job_id]
            self._client.tell(Cancel(id=job_id, choice=choice))
            return
        if growing is None or choice not in growing:
            return
        growing.discard(choice)
        if growing:
            self._client.tell(Cancel(id=job_id, choice=choice))
        else:
            self._end_job(job_id)

    def abort(self, error: BaseException) -> None:
        """Cancel everything; whoever waits in `get` gets ``error``."""
        if self._error is None:
            self._error = error
        self.close()
        self._bell.ring()

    def close(self) -> None:
        """Cancel every job that is not finished. May be called at any time, any number of times; never waits."""
        self._bell.close()
        if self._reading:
            self.left_behind = bool(self._open)
            for name in (self._reading, *self._open):
                self._client.forget(name)
            self._open.clear()
            self._client.tell(Cancel(id=self._reading))
            self._reading = ""
            return
        for job_id in list(self._open):
            self._end_job(job_id)

    def _end_job(self, job_id: str) -> None:
        if self._open.pop(job_id, None) is not None:
            self._client.forget(job_id)
            self._client.tell(Cancel(id=job_id))

    def put(self, event: Event) -> None:
        """Called by the client's reader."""
        pending = len(self._events)
        if pending >= self._max_pending or (
            pending >= LOOK_EVENTS and pending % LOOK_EVENTS == 0 and self._crowds_others_out()
        ):
            self._events.clear()
            self.abort(ReaderTooSlow())
            return
        self._events.append(event)
        self._bell.ring()
        if type(event) is Output:
            timings = self.timings
            # Tokens of one frame (of several choices) came together.
            if timings is not None and self.last_token_at != timings.now and event.ids:
                if self.last_token_at:
                    timings.gaps.append(timings.now - self.last_token_at)
                else:
                    self.first_token_at = timings.now
                    timings.first_tokens.append(timings.now - self.begun_at)
                    if self.on_first_token is not None:
                        self.on_first_token()
                self.last_token_at = timings.now
            if event.finish_reason is not None:
                growing = self._open.get(event.id)
                if growing is not None:
                    growing.discard(event.choice)
                    if not growing:
                        self._finished(event.id)
        elif isinstance(event, Failed | Embedded):
            if isinstance(event, Failed):
                self.failure = event
            elif not self.started_at:
                # An answer is the first word of it.
                self.started_at = time.monotonic()
            self._finished(event.id)
        elif isinstance(event, Started) and not self.started_at:
            self.started_at = time.monotonic()
            if self.timings is not None:
                self.timings.queued.append(self.started_at - self.begun_at)

    def _crowds_others_out(self) -> bool:
        return self._max_pending == MAX_PENDING_OF_READING and self._client.pending_events() >= MAX_PENDING_OF_ALL

    def _finished(self, job_id: str) -> None:
        self._open.pop(job_id, None)
        if job_id != self._reading:
            self._client.forget(job_id)
