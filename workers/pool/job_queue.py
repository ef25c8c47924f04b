"""The way down to one incarnation of a model worker: orders, as bytes, over a multiprocessing queue."""

from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue

import msgspec

from workers.entry import STOP
from workers.messages import LogAs, Order

_encoder = msgspec.msgpack.Encoder()


class JobQueue:
    """A queue for a single reader's single life: it is never handed to the next incarnation.

    A reader that is killed inside ``get`` takes the queue's lock with it, and the queue is dead for whoever comes next;
    so each incarnation has its own. `put` only appends to a list: a thread of the queue writes to the pipe. That thread
    may block for a reader that stands still, and ends with EPIPE as soon as that reader is dead, because the pool keeps
    no reading end of its own (`child_has_it`). Nothing waits for the thread, at exit neither.
    """

    def __init__(self, context: BaseContext) -> None:
        self.queue: Queue[bytes] = context.Queue()
        # The standard library's own switch for "the reader may die" (concurrent.futures uses it); without it the thread
        # would print a traceback for every order that follows.
        self.queue._ignore_epipe = True  # type: ignore[attr-defined]
        self.queue.cancel_join_thread()

    def child_has_it(self) -> None:
        """Close the pool's copy of the reading end, now that the child was started with its own."""
        self.queue._reader.close()  # type: ignore[attr-defined]

    def put(self, order: Order | LogAs) -> None:
        """Send ``order``. Never blocks."""
        self.queue.put(_encoder.encode(order))

    def put_stop(self) -> None:
        """Tell the engine to return."""
        self.queue.put(STOP)

    def close(self) -> None:
        """Let go of the queue: its thread ends, and its pipe closes with the last reference."""
        self.queue.close()
