"""The events of a background response, read from the store while its process writes them there."""

import time
from collections.abc import Callable, Iterator

import gevent

from app.api import sse
from app.api.keeping import store_errors
from app.api.responses.conversations import KIND
from app.api.responses.output import encode_event, last_event
from app.errors import ApiError
from app.store.record import Record
from app.store.store import Store

# How often the store is looked at.
_LOOK_S = 0.1
_EVENTS_AT_ONCE = 500


class EventReader:
    """The events of ``response_id`` behind number ``after``."""

    def __init__(self, store: Store, tenant: str, response_id: str, after: int) -> None:
        self._store = store
        self._tenant = tenant
        self._id = response_id
        self._last = after

    def parts(self, tick_s: float | None, gone: Callable[[], bool]) -> Iterator[bytes]:
        """Yield them as they come, up to the last one; a comment after ``tick_s`` seconds without any.

        Ends early when ``gone`` tells that nobody reads any more. A store that fails is told by an ``error`` event.
        """
        said = time.monotonic()
        while not gone():
            try:
                record, events = self._look()
            except ApiError as error:
                fields = {"code": error.code, "message": error.message, "param": error.param}
                yield encode_event(self._id, self._last + 1, "error", fields)
                return
            if events:
                said = time.monotonic()
                yield b"".join(events)
            elif record is None or not record.is_running:
                if record is not None and not self._has_end(record):
                    # It was cancelled, or its process killed.
                    yield encode_event(self._id, self._last + 1, last_event(record.body), {"response": record.body})
                return
            else:
                if tick_s is not None and time.monotonic() - said >= tick_s:
                    said = time.monotonic()
                    yield sse.KEEP_ALIVE
                gevent.sleep(_LOOK_S)

    def _look(self) -> tuple[Record | None, list[bytes]]:
        """The response, and its next events. Raises `ApiError`."""
        with store_errors():
            # In this order: a response that has ended has all its events in the store.
            record = self._store.get(KIND, self._tenant, self._id)
            events = self._store.events(self._id, self._last, _EVENTS_AT_ONCE)
        if events:
            self._last = events[-1][0]
        return record, [event for _, event in events]

    def _has_end(self, record: Record) -> bool:
        try:
            with store_errors():
                latest = self._store.latest_event(record.id)
        except ApiError:
            return True
        kind = last_event(record.body)
        return latest is not None and latest[1].startswith(f"event: {kind}\n".encode())
