"""A request that was let in: who asks, and what has been booked for it."""

import contextvars
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from app.door import limits
from app.door.ledger import Account, Ledger
from config.logs import request_label

T = TypeVar("T")

_visitor: ContextVar["Visitor | None"] = ContextVar("visitor", default=None)


class Visitor:
    """``owner`` is the name of the key's owner, "" without keys; ``origin`` the web page that asks, if one does."""

    __slots__ = ("_holders", "_ledger", "account", "address", "origin", "owner", "request_id")

    def __init__(self, request_id: str, address: str, origin: str) -> None:
        self.request_id = request_id
        self.address = address
        self.origin = origin
        self.owner = ""
        self.account: Account | None = None
        # Where the request is booked as open, and for how many: its answer, and what goes on in the background.
        self._ledger: Ledger | None = None
        self._holders = 1

    def enter(self, owner: str, account: Account | None, ledger: Ledger | None) -> None:
        """The key is right; ``ledger`` is given if the request is booked there."""
        self.owner, self.account, self._ledger = owner, account, ledger

    def reserve(self, prompt_tokens: int, most: int) -> "Reservation | None":
        """Take the tokens that the request may use, ``most`` of them at most, from what the owner has left.

        More than a minute's worth is never reserved: a long answer that was asked for may turn out short. Returns None
        where tokens are not limited. Raises `ApiError` 429.
        """
        account, ledger = self.account, self._ledger
        per_minute = account.limits.tokens_per_minute if account is not None else None
        if account is None or ledger is None or not per_minute:
            return None
        if prompt_tokens > per_minute:
            raise limits.never_fits(prompt_tokens, per_minute)
        tokens = min(most, per_minute)
        booked = ledger.book_tokens(self.owner, account.limits, tokens, least=tokens)
        account.tokens_left = booked.tokens_left
        if booked.refusal:
            raise limits.refusal(booked)
        return Reservation(self.owner, account, ledger, tokens)

    def stay(self) -> None:
        """The request remains open for one more, who has to `leave` too."""
        self._holders += 1

    def leave(self) -> None:
        """The answer is out, or there will be none; or what has `stay`ed is done."""
        self._holders -= 1
        if self._holders == 0 and self._ledger is not None:
            self._ledger.leave(self.owner)
        if _visitor.get() is self:
            _visitor.set(None)
            request_label.set("")


class VisitorsAnswer:
    """An answer on its way: its request is open until the server closes it, which it does whatever happens.

    The parts are taken from the answer itself, since whatever stands in between costs time for each token.
    """

    def __init__(self, parts: Iterable[bytes], visitor: Visitor) -> None:
        self._parts = parts
        self._visitor = visitor
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._parts)

    def close(self) -> None:
        """The last part is out, or nobody takes it."""
        if self._closed:
            return
        self._closed = True
        try:
            close = getattr(self._parts, "close", None)
            if close is not None:
                close()
        finally:
            self._visitor.leave()


class Reservation:
    """Tokens that were taken beforehand."""

    __slots__ = ("_account", "_ledger", "_owner", "_tokens")

    def __init__(self, owner: str, account: Account, ledger: Ledger, tokens: int) -> None:
        self._owner = owner
        self._account = account
        self._ledger = ledger
        self._tokens = tokens

    def settle(self, used: int) -> None:
        """Give back what was not used, or take what was used beyond. Only the first call counts."""
        tokens, self._tokens = self._tokens, 0
        if tokens:
            self._ledger.book_tokens(self._owner, self._account.limits, used - tokens)


def current() -> Visitor | None:
    """Return whose request the running code belongs to; None outside of requests."""
    return _visitor.get()


def begin(visitor: Visitor) -> None:
    """From here on this greenlet works for ``visitor``, and its log lines say so."""
    _visitor.set(visitor)
    request_label.set(f"{visitor.request_id} {visitor.owner}" if visitor.owner else visitor.request_id)


def carried(function: Callable[..., T]) -> Callable[..., T]:
    """Return ``function`` so that it works for the present request wherever it is called: greenlet, timer or thread."""
    context = contextvars.copy_context()

    def call(*args: Any, **kwargs: Any) -> T:
        return context.run(function, *args, **kwargs)

    return call


def staying(function: Callable[..., T]) -> Callable[..., T]:
    """Return ``function`` as `carried` does; the present request counts as open until it returns. Call it once."""
    guest = current()
    if guest is not None:
        guest.stay()

    def call(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        finally:
            if guest is not None:
                guest.leave()

    return carried(call)
