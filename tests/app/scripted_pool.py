"""A pool without models: speaks the real wire protocol on a real Unix socket, and answers as the test says.

It runs on threads of the test process, so a test sees each job as it comes and sends what it wants back, while the HTTP
side under test is in the same process (Flask's test client) or in a gunicorn worker of its own.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gevent

from tests.app.tiny import tokenizer
from workers.messages import (
    Attach,
    Cancel,
    ClientMessage,
    Embedded,
    EmbedJob,
    Event,
    Events,
    Failed,
    GenerateJob,
    Job,
    Keep,
    Output,
    PoolStatus,
    PromptLogprobs,
    Started,
    StatusQuery,
    TokenLogprobs,
    WorkerStatus,
)
from workers.pool.journal import Entry
from workers.pool.room import Room
from workers.pool.rooms import Rooms
from workers.wire import Decoder, encode

# What is waited for comes at once, but for a machine whose cores are taken: only a failure takes all of this.
DEADLINE_S = 60.0

Reply = Callable[[Job], Iterable[Event] | None]


def silent(job: Job) -> None:
    """The test itself answers, with `ScriptedPool.send`."""


def tokens(ids: Sequence[int], stop: int | None = None, reason: str | None = None) -> Reply:
    """Answer each choice with these tokens, one event each; ends with the stop token or with ``reason``."""

    def reply(job: Job) -> list[Event]:
        assert isinstance(job, GenerateJob)
        events: list[Event] = [Started(id=job.id)]
        for token in ids:
            events += [Output(id=job.id, choice=choice, ids=[token]) for choice in range(job.n)]
        for choice in range(job.n):
            if stop is not None:
                end = Output(id=job.id, choice=choice, ids=[stop], finish_reason="stop", stop_token_id=stop)
            else:
                end = Output(id=job.id, choice=choice, finish_reason=reason or "length")  # type: ignore[arg-type]
            events.append(end)
        return events

    return reply


def score(place: int, top: int, lead: int = 0) -> TokenLogprobs:
    """Scores that tell where they belong: the token at ``place`` has -place - 1, alternatives -0.1, -0.2, ..."""
    return TokenLogprobs(-(place + 1.0), [(lead + each, -(each + 1) / 10) for each in range(top)])


def scored(
    ids: Sequence[int], stop: int | None = None, reason: str | None = None, per_event: int = 1, lead: int = 0
) -> Reply:
    """Answer as the engine does a job that asks for log-probabilities (of the prompt, of the output, or none).

    ``per_event`` tokens come at a time. The alternatives are the token ids from ``lead`` on.
    """

    def reply(job: Job) -> list[Event]:
        assert isinstance(job, GenerateJob)
        events: list[Event] = [Started(id=job.id, cached_tokens=3)]
        if job.prompt_logprobs is not None:
            known = [score(place, job.prompt_logprobs, lead) for place in range(1, len(job.prompt))]
            events.append(PromptLogprobs(id=job.id, logprobs=known))
        if job.max_tokens == 0:
            return [*events, *(Output(id=job.id, choice=choice, finish_reason="length") for choice in range(job.n))]
        whole = [*ids, *([] if stop is None else [stop])]
        for first in range(0, len(whole), per_event):
            part = whole[first : first + per_event]
            top = job.logprobs
            given = [] if top is None else [score(first + place, top, lead) for place in range(len(part))]
            last = first + per_event >= len(whole)
            ending: Any = (
                ("stop" if stop is not None else reason or "length") if last else None,
                stop if last else None,
            )
            events += [
                Output(
                    id=job.id,
                    choice=choice,
                    ids=part,
                    logprobs=given,
                    finish_reason=ending[0],
                    stop_token_id=ending[1],
                )
                for choice in range(job.n)
            ]
        return events

    return reply


def vectors(make: Callable[[EmbedJob], bytes]) -> Reply:
    """Answer embedding jobs."""
    return lambda job: [Started(id=job.id), Embedded(id=job.id, vector=make(job))]


def refusal(kind: str, message: str = "no", retry_after: float | None = None, **more: Any) -> Reply:
    """Refuse every job; ``more`` are fields of `Failed`."""
    return lambda job: [Failed(id=job.id, kind=kind, message=message, retry_after=retry_after, **more)]  # type: ignore[arg-type]


class Line:
    """One connection, as rooms see it: what is posted goes out with `flush`, in one frame."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = bytearray()
        self.events: list[Event] = []
        self.post = self.events.append

    def flush(self) -> None:
        if self.events:
            frame = encode(Events(events=list(self.events)))
            self.events.clear()
            with contextlib.suppress(OSError):
                self.connection.sendall(frame)


class ScriptedPool:
    """The pool's end of the socket at ``path``. ``jobs`` and ``cancels`` hold all that came, in order.

    Kept requests are kept by the real rooms, for ``window_s`` by ``clock``.
    """

    def __init__(
        self,
        path: Path,
        card_path: Path | None,
        *,
        window_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._window_s = window_s
        self._lock = threading.RLock()
        self._lines: dict[socket.socket, Line] = {}
        self._rooms_of: dict[str, Room] = {}
        self._open_rooms()
        self.path = path
        self.reply: Reply = silent
        self.jobs: list[Job] = []
        self.cancels: list[Cancel] = []
        self.answers_queries = True
        self.status = self._status(card_path)
        self._owners: dict[str, socket.socket] = {}
        self._connections: list[socket.socket] = []
        self._listener: socket.socket | None = None

    # --- what a test does

    def start(self) -> "ScriptedPool":
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def _open_rooms(self) -> None:
        self.rooms = Rooms(self, window_s=self._window_s, clock=self._clock)
        self._rooms_of.clear()

    def stop(self) -> None:
        """Die: no listener, all connections cut, everything forgotten."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.path.unlink(missing_ok=True)
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()
        self._owners.clear()
        self._open_rooms()

    def reset(self) -> None:
        """Forget the past, for the next test."""
        self.reply = silent
        self.answers_queries = True
        self.jobs.clear()
        self.cancels.clear()
        with self._lock:
            self._open_rooms()

    def send(self, *events: Event) -> None:
        """Send events, in one frame, to whoever asked for the first one's job, or reads it."""
        room = self._rooms_of.get(events[0].id)
        if room is not None:
            self._tell(room, events)
            return
        self.send_raw(events[0].id, encode(Events(events=list(events))))

    def send_raw(self, job_id: str, data: bytes) -> None:
        """Send bytes to whoever asked for this job."""
        self._owners[job_id].sendall(data)

    def tell(self, status: PoolStatus) -> None:
        """Change the state and tell everybody."""
        self.status = status
        for connection in list(self._connections):
            connection.sendall(encode(status))

    def next_job(self, count: int = 1) -> Job:
        """Wait for the ``count``-th job and return it."""
        self.wait(lambda: len(self.jobs) >= count)
        return self.jobs[count - 1]

    def wait(self, condition: Callable[[], Any], timeout: float = DEADLINE_S) -> None:
        """Wait until ``condition`` holds; meanwhile the application in this process goes on."""
        eventually(condition, timeout)

    def tend(self) -> None:
        """Let the rooms look at the clock."""
        with self._lock:
            self.rooms.tend(self._clock())
            self._flush()

    def hang_up(self) -> None:
        """Cut the connections of all HTTP workers: they take it for the pool's death, the rooms for theirs."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the whole job was cancelled."""
        return any(cancel.id == job_id and cancel.choice is None for cancel in self.cancels)

    @staticmethod
    def _status(card_path: Path | None, ready: bool | None = None, **changes: Any) -> PoolStatus:
        loaded = card_path is not None
        worker = WorkerStatus(
            index=0, device="cpu", pid=1, state="ready" if loaded else "loading", progress=1.0 if loaded else 0.42
        )
        values: dict[str, Any] = {
            "ready": loaded if ready is None else ready,
            "draining": False,
            "queued": 0,
            "running": 0,
            "card_path": str(card_path) if card_path else None,
            "workers": [worker],
        }
        return PoolStatus(**{**values, **changes})

    # --- what rooms want of a broker

    def cancel(self, client: Room, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        entry = client.jobs[cancel.id]
        entry.drop(cancel.choice or 0)
        if entry.complete:
            del client.jobs[cancel.id]

    def client_gone(self, client: Room) -> None:
        self.cancels += [Cancel(id=job_id) for job_id in client.jobs]
        client.jobs.clear()

    def _tell(self, room: Room, events: Iterable[Event]) -> None:
        """As the broker does."""
        with self._lock:
            for event in events:
                entry = room.jobs.get(event.id)
                if entry is None or (isinstance(event, Output) and not entry.accept(event)):
                    continue
                room.post(event)
                if isinstance(event, Failed) or (isinstance(event, Output) and entry.complete):
                    del room.jobs[event.id]
            self._flush()

    def _flush(self) -> None:
        while True:
            for line in self._lines.values():
                line.flush()
            if not self.rooms.busy:
                break
            self.rooms.pump()

    def _take_kept(self, message: ClientMessage, connection: socket.socket) -> bool:
        """Do what concerns kept requests; return whether that was all there is to do."""
        line = self._lines.setdefault(connection, Line(connection))
        if isinstance(message, Keep):
            line.post(self.rooms.keep(line, message))
        elif isinstance(message, Attach):
            self.rooms.attach(line, message)
        elif not isinstance(message, Cancel) or not self.rooms.cancel(line, message):
            if isinstance(message, GenerateJob) and message.kept:
                room = self.rooms.room_for(line, message)
                assert room is not None
                room.jobs[message.id] = Entry(message, room)
                self._rooms_of[message.id] = room
            return False
        self._flush()
        return True

    # --- the threads

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(encode(self.status))
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        decoder: Decoder[ClientMessage] = Decoder(ClientMessage)
        with contextlib.suppress(OSError):
            while data := connection.recv(65536):
                for message in decoder.feed(data):
                    self._take(message, connection)
        with self._lock:
            if connection in self._lines:
                self.rooms.client_gone(self._lines.pop(connection))

    def _take(self, message: ClientMessage, connection: socket.socket) -> None:
        if isinstance(message, StatusQuery):
            if self.answers_queries:
                connection.sendall(encode(self.status))
            return
        with self._lock:
            if self._take_kept(message, connection):
                return
        if isinstance(message, Cancel):
            self.cancels.append(message)
            return
        assert isinstance(message, GenerateJob | EmbedJob)
        self._owners[message.id] = connection
        events = self.reply(message)
        self.jobs.append(message)
        if events is not None:
            # A reply may wait for something that the client sends.
            threading.Thread(target=self._answer, args=(events, message.id, connection), daemon=True).start()

    def _answer(self, events: Iterable[Event], job_id: str, connection: socket.socket) -> None:
        room = self._rooms_of.get(job_id)
        with contextlib.suppress(OSError):
            for event in events:
                if room is not None:
                    self._tell(room, [event])
                else:
                    connection.sendall(encode(Events(events=[event])))


def generate_job(pool: ScriptedPool) -> GenerateJob:
    """The last job, which must be one of generation."""
    job = pool.jobs[-1]
    assert isinstance(job, GenerateJob)
    return job


def prompt_text(pool: ScriptedPool) -> str:
    """The prompt of the last job as the model reads it."""
    return tokenizer().decode(generate_job(pool).prompt, skip_special_tokens=False)


def eventually(condition: Callable[[], Any], timeout: float = DEADLINE_S) -> Any:
    """Return the first true value of ``condition``; meanwhile the greenlets of this process run."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen in time"
        gevent.sleep(0.005)
