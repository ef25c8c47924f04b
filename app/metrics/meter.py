"""One HTTP worker's meter: what becomes of its requests, how long they wait, and how late its own greenlets wake."""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent

from app.metrics import definitions as of
from app.metrics.causes import cancel_cause, door_cause, failure_cause, refusal_cause
from app.metrics.shared import absorb, read
from app.metrics.tally import Numbers, Tally
from app.pool_stream import Stream
from app.text.errors import DeadlineExceeded
from app.text.generation import Generation
from app.text.offload import off_hub
from app.timings import Timings

FOLDER = "metrics"

# How often the pulse beats; a hub that is busy for longer is late by what is missing.
BEAT_S = 0.1
# In beats: when the lists are counted and written, and when the kernel is asked about this process.
_COUNT_BEATS = 10
_LOOK_BEATS = 50
# In counts.
_RECENT = 10

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})
_NO_ROUTE = "none"


class Meter:
    """Counts for this process; `snapshot` tells the numbers of all HTTP workers.

    ``open_requests`` tells how many this process is answering. Nothing here ever fails a request.
    """

    def __init__(self, runtime_dir: Path, timings: Timings, open_requests: Callable[[], int]) -> None:
        self._folder = runtime_dir / FOLDER
        self._timings = timings
        self._open_requests = open_requests
        self._tally = Tally(self._folder)
        self._watched: dict[Stream, Generation] = {}
        self._lags: list[float] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._beats = 0
        self._closed = False

    def start(self) -> None:
        """Begin to measure the hub, and to write; ends with `close`, or when nobody has this meter any more."""
        self._look()
        self._count()
        absorb(self._folder)
        gevent.spawn(_beat, weakref.ref(self))

    def close(self) -> None:
        """The last numbers are written; what this process was is forgotten, what it counted is not."""
        self._closed = True
        self._count()
        self._tally.close()

    # --- what happens

    def http_request(self, route: str | None, method: str, status: int) -> None:
        """An HTTP request gets its answer; ``route`` is the template of its URL."""
        named = method if method in _METHODS else "other"
        self._tally.add(of.HTTP, route or _NO_ROUTE, named, str(status))
        self._tally.flush()

    def refused_at_door(self, method: str, status: int) -> None:
        """The door has answered a request itself."""
        if status >= 400:
            self._tally.add(of.REFUSED, door_cause(status))
        self.http_request(None, method, status)

    def failed(self, error: BaseException, stream: Stream | None) -> None:
        """A request ends with ``error``, which its client is told; to be told before ``stream``, if it has one, ends.

        What was ended from outside, and what the pool failed after it had begun, is counted with the stream's end; what
        is told again was counted when it was told for the first time.
        """
        if stream is not None and (
            stream.timings is None or cancel_cause(stream.error) or (stream.failed and stream.started_at)
        ):
            return
        generation = self._watched.pop(stream, None) if stream is not None else None
        cause = refusal_cause(error)
        if cause is not None:
            self._tally.add(of.REFUSED, cause)
        elif isinstance(error, DeadlineExceeded):
            self._tally.add(of.CANCELLED, "deadline")
        elif generation is not None and generation.started:
            self._tally.add(of.FAILED, "internal")

    def watch(self, stream: Stream, generation: Generation) -> None:
        """``stream`` is that of ``generation``: its end says more than the stream's own."""
        self._watched[stream] = generation

    def ended(self, stream: Stream) -> None:
        """The request of ``stream`` is over; to be told before the stream is closed."""
        generation = self._watched.pop(stream, None)
        cause = cancel_cause(stream.error)
        if stream.timings is None:
            # It was counted when it was told for the first time.
            return
        if cause is not None:
            self._tally.add(of.CANCELLED, "left" if cause == "client_gone" and stream.goes_on else cause)
        elif stream.failed:
            if stream.started_at:
                self._tally.add(of.FAILED, failure_cause(stream))
        elif generation is not None:
            self._generation_ended(stream, generation)
        elif stream.started_at and not stream.unfinished:
            self._tally.add(of.EMBEDDED)
        self._drain()
        self._tally.flush()

    def _generation_ended(self, stream: Stream, generation: Generation) -> None:
        if generation.cut:
            self._tally.add(of.CANCELLED, "deadline")
        elif not generation.finished:
            if stream.unfinished:
                # It was noticed by nobody but whoever wrote to it.
                self._tally.add(of.CANCELLED, "left" if stream.goes_on else "client_gone")
            return
        else:
            for choice, reason in enumerate(generation.finish_reasons):
                self._tally.add(of.SUCCESS, reason or "stop")
                if generation.stop_string(choice) is not None:
                    self._tally.add(of.CUT_STRINGS)
        self._tally.observe(of.LATENCY, [time.monotonic() - stream.begun_at])

    # --- what is told

    def snapshot(self) -> Numbers:
        """Return the numbers of all HTTP workers, dead ones included; read on a native thread."""
        self._count()
        return off_hub(read, self._folder, self._tally.name, dict(self._tally.numbers))

    # --- the pulse

    def _tick(self, lag: float) -> None:
        self._lags.append(lag)
        self._beats += 1
        if self._beats % _LOOK_BEATS == 0:
            self._look()
        if self._beats % _COUNT_BEATS == 0:
            self._recent.append(max(self._lags, default=0.0))
            self._tally.observe(of.LAG, self._lags)
            self._lags = []
            self._count()

    def _count(self) -> None:
        self._drain()
        self._tally.set(of.OPEN, 0 if self._closed else self._open_requests())
        self._tally.set(of.WORKERS, 0 if self._closed else 1)
        self._tally.set(of.LAG_NOW, max(self._recent, default=0.0))
        self._tally.flush()

    def _drain(self) -> None:
        gaps, first_tokens, queued = self._timings.take()
        self._tally.observe(of.GAP, gaps)
        self._tally.observe(of.FIRST_TOKEN, first_tokens)
        self._tally.observe(of.QUEUE_TIME, queued)

    def _look(self) -> None:
        """What the kernel knows of this process; elsewhere than on Linux nothing."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        except (OSError, IndexError, ValueError):
            return
        resident = float(pages * os.sysconf("SC_PAGE_SIZE"))
        self._tally.set(of.RESIDENT, resident)
        self._tally.set(of.LARGEST, resident)
        self._tally.set(of.DESCRIPTORS, float(descriptors))


def _beat(reference: "weakref.ref[Any]") -> None:
    while True:
        asked = time.monotonic()
        gevent.sleep(BEAT_S)
        meter = reference()
        if meter is None or meter._closed:
            return
        meter._tick(max(0.0, time.monotonic() - asked - BEAT_S))
        del meter
