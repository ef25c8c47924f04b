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

from workers.messages import (
    Cancel,
    ClientMessage,
    Embedded,
    EmbedJob,
    Event,
    Events,
    Failed,
    GenerateJob,
    Job,
    Output,
    PoolStatus,
    PromptLogprobs,
    Started,
    StatusQuery,
    TokenLogprobs,
    WorkerStatus,
)
from workers.wire import Decoder, encode

DEADLINE_S = 10.0

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


def refusal(kind: str, message: str = "no", retry_after: float | None = None) -> Reply:
    """Refuse every job."""
    return lambda job: [Failed(id=job.id, kind=kind, message=message, retry_after=retry_after)]  # type: ignore[arg-type]


class ScriptedPool:
    """The pool's end of the socket at ``path``. ``jobs`` and ``cancels`` hold all that came, in order."""

    def __init__(self, path: Path, card_path: Path | None) -> None:
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

    def stop(self) -> None:
        """Die: no listener, all connections cut."""
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

    def reset(self) -> None:
        """Forget the past, for the next test."""
        self.reply = silent
        self.answers_queries = True
        self.jobs.clear()
        self.cancels.clear()

    def send(self, *events: Event) -> None:
        """Send events, in one frame, to whoever asked for the first one's job."""
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

    def _take(self, message: ClientMessage, connection: socket.socket) -> None:
        if isinstance(message, StatusQuery):
            if self.answers_queries:
                connection.sendall(encode(self.status))
            return
        if isinstance(message, Cancel):
            self.cancels.append(message)
            return
        self._owners[message.id] = connection
        events = self.reply(message)
        self.jobs.append(message)
        if events is not None:
            # A reply may wait for something that the client sends.
            threading.Thread(target=self._answer, args=(events, connection), daemon=True).start()

    @staticmethod
    def _answer(events: Iterable[Event], connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for event in events:
                connection.sendall(encode(Events(events=[event])))


def eventually(condition: Callable[[], Any], timeout: float = DEADLINE_S) -> Any:
    """Return the first true value of ``condition``; meanwhile the greenlets of this process run."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen in time"
        gevent.sleep(0.005)
