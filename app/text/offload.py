"""Work that would hold up the hub runs on gevent's native threads.

While one greenlet computes, no other client of this process is served. Everything whose cost grows with the prompt goes
through `off_hub`; the library calls behind it must release the GIL (or be Python code, which gives it up every 5 ms).
"""

import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

import gevent

T = TypeVar("T")

_A_MOMENT_S = 0.0001

# Below this size (characters or bytes) the hop to another thread costs more than the work.
INLINE_SIZE = 4096
# A value is worth so many characters.
_VALUE_SIZE = 8


def weight(value: Any) -> int:
    """Return about how much work JSON values are, in the measure of `off_hub_if_large`: exact while it is little.

    Itself it is no work: it stops where the rest does not matter any more.
    """
    size = 0
    waiting = [value]
    while waiting and size <= INLINE_SIZE:
        each = waiting.pop()
        size += _VALUE_SIZE
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, dict | list | tuple):
            if len(each) > INLINE_SIZE:
                return INLINE_SIZE + len(each)
            waiting += each
            if isinstance(each, dict):
                waiting += each.values()
    return size


def give_way() -> None:
    """Let every other greenlet run that can, those that wait for sockets and clocks included.

    ``sleep(0)`` is not enough: the loop may call its sleepers fifty times before it looks at a socket or a clock.
    """
    gevent.sleep(_A_MOMENT_S)


def off_hub(function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, computed on a native thread while other greenlets run. Raises what it raises."""

    def guarded() -> tuple[T | None, BaseException | None]:
        # An exception that reaches the thread pool is printed with a traceback; ours is an ordinary outcome.
        try:
            return function(*args), None
        except Exception as error:
            return None, error

    # Log lines and tenants are those of the request, there too.
    value, error = gevent.get_hub().threadpool.apply(contextvars.copy_context().run, (guarded,))
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def off_hub_if_large(size: int, function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``: here when ``size`` is small, else as `off_hub` does."""
    if size <= INLINE_SIZE:
        return function(*args)
    return off_hub(function, *args)
