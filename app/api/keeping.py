"""What all routes that keep something share: the store, and its troubles as answers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gevent
from flask import current_app

from app.api.service import service, tenant_salt
from app.door.visitor import carried
from app.errors import UNAVAILABLE, ApiError, invalid
from app.store.errors import ChainBroken, StoreError, TooLarge, TooMuch
from app.store.record import Record, Retention
from app.store.store import Store
from config import logs

log = logs.logger("tailrace.store")

_EXTENSION = "tailrace.store"
# How long to wait before a disk that refused is tried again.
_TRY_AGAIN_S = 2.0
# What is kept of a conversation may be larger than its texts: scores of tokens are kept too.
_BODIES_IN_CONVERSATION = 4


def store() -> Store:
    """Return the application's store."""
    extensions = current_app.extensions
    if _EXTENSION not in extensions:
        settings = service().settings
        kept = Retention(settings.store_max_items, settings.store_max_bytes, settings.store_max_age_s)
        extensions[_EXTENSION] = Store(settings.state_dir, kept)
    return extensions[_EXTENSION]  # type: ignore[no-any-return]


def close_store(extensions: Mapping[str, Any]) -> None:
    """Give the file back, if it was ever opened. Never raises."""
    opened = extensions.get(_EXTENSION)
    if opened is not None:
        with contextlib.suppress(StoreError, OSError):
            opened.close()


def most_of_conversation() -> int:
    """Return how many bytes of stored things one request may make us read: a small one must not cost much memory."""
    return _BODIES_IN_CONVERSATION * service().settings.max_body_bytes


def is_to_be_kept(asked: bool | None, default: bool) -> bool:
    """Whether an answer is kept. Raises `ApiError` 400 if it should, and this server keeps nothing."""
    if service().settings.store_max_items > 0:
        return default if asked is None else asked
    if asked:
        raise invalid("This server stores nothing; send store: false.", "store")
    return False


@contextlib.contextmanager
def store_errors(param: str = "previous_response_id") -> Iterator[None]:
    """Turn the store's troubles into `ApiError`; only requests that need the store ever meet them.

    ``param`` is the field that refers to stored things.
    """
    try:
        yield
    except TooLarge:
        raise invalid("This is larger than all that the server stores; send store: false.", "store") from None
    except TooMuch as error:
        raise invalid(f"What is stored of this conversation is larger than {error.most} bytes.", param) from None
    except StoreError as error:
        log.error("the store cannot be used", reason=error.reason)
        raise ApiError(
            503,
            "The server cannot store or look up anything at the moment; requests with store: false are not affected.",
            kind=UNAVAILABLE,
            code="store_unavailable",
            retry_after=5,
        ) from None
    except ChainBroken as error:
        raise ApiError(
            404,
            f"The conversation goes back to {error.missing}, which is not stored any more.",
            param=param,
            code="previous_response_not_found",
        ) from None


@dataclass(frozen=True, slots=True)
class Shelf:
    """The client's own records of one kind; ``noun`` and ``param`` are what an error calls one of them."""

    kind: str
    noun: str
    param: str

    def get(self, record_id: str) -> Record:
        """Return a record. Raises `ApiError`, 404 if there is none."""
        with store_errors():
            record = store().get(self.kind, tenant_salt(), record_id)
        return self._found(record, record_id)

    def amend(self, record_id: str, change: Callable[[Record], Record]) -> Record:
        """Keep the record as ``change`` makes it, and return it. Raises `ApiError`, 404 if there is none."""
        with store_errors():
            record = store().amend(self.kind, tenant_salt(), record_id, change)
        return self._found(record, record_id)

    def delete(self, record_id: str) -> None:
        """Forget a record. Raises `ApiError`, 404 if there is none."""
        with store_errors():
            found = store().delete(self.kind, tenant_salt(), record_id)
        if not found:
            raise self.missing(record_id)

    def missing(self, record_id: str) -> ApiError:
        """A 404 for a record that there is not, or not for this client."""
        return ApiError(404, f"{self.noun} with id {record_id[:64]!r} not found.", param=self.param)

    def _found(self, record: Record | None, record_id: str) -> Record:
        if record is None:
            raise self.missing(record_id)
        return record


class Keeping:
    """How one answer is kept: as the running record ``record_id``, or, without a store, not at all."""

    def __init__(self, store: Store | None, record_id: str) -> None:
        self._store = store
        self._id = record_id
        self._settled = store is None
        self._promised = False

    @property
    def is_settled(self) -> bool:
        """Whether the last state is kept, or going to be."""
        return self._settled or self._promised

    def settle(
        self, body: Mapping[str, Any], items: Sequence[str] = (), events: Sequence[tuple[int, bytes]] = ()
    ) -> bool:
        """Keep the last state; only the first call counts. False if it was cancelled or deleted. Raises `ApiError`."""
        if self._store is None or self._settled:
            return True
        with store_errors():
            kept = self._store.settle(self._id, body, items, events)
        self._settled = True
        return kept

    def settle_surely(self, body: Mapping[str, Any], events: Sequence[tuple[int, bytes]] = ()) -> None:
        """Keep the last state of an answer that nobody waits for, sooner or later; never waits, never raises."""
        if not self.is_settled:
            self._promised = True
            gevent.spawn(carried(self._settle_until_done), body, events)

    def _settle_until_done(self, body: Mapping[str, Any], events: Sequence[tuple[int, bytes]]) -> None:
        # While this process lives, a record that stays unfinished would be taken for a running one.
        while True:
            try:
                self.settle(body, events=events)
            except ApiError:
                gevent.sleep(_TRY_AGAIN_S)
            else:
                return
