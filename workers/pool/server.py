"""The pool's loop: one selector over clients, workers, signals and the lifeline, and no other waiting."""

import contextlib
import logging
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from workers.config import WorkerConfig
from workers.messages import Cancel, PoolStatus, StatusQuery, WorkerStatus
from workers.pool.broker import Broker
from workers.pool.client import Client, Gone
from workers.pool.incarnation import Incarnation, Life
from workers.pool.rendezvous import Rendezvous
from workers.pool.signals import SignalPipe
from workers.pool.supervisor import Limits, ModelWorker, Supervisor
from workers.wire import encode

log = logging.getLogger("tailrace.pool")

EXIT_OK = 0
# What the operator's configuration makes impossible. Never 3 or 4, which mean something to gunicorn.
EXIT_FATAL = 2

_ARBITER_MARGIN_S = 15.0
_CHECK_SOCKET_S = 5.0
_ACCEPT_PAUSE_S = 1.0
_STATUS_PAUSE_S = 0.1


class Display(Protocol):
    """Who shows people how loading goes."""

    def show(self, workers: Sequence[WorkerStatus]) -> None: ...
    def ready(self) -> None: ...
    def close(self) -> None: ...


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the pool. ``client_pending_bytes`` must hold a burst of embeddings; times are in seconds.

    ``drain_s``: how long running jobs may go on when a pool of its own (without a lifeline) is told to stop.
    """

    max_batch: int = 32
    max_queue: int = 256
    max_replays: int = 1
    max_clients: int = 1024
    client_pending_bytes: int = 64 * 1024 * 1024
    client_patience_s: float = 30.0
    drain_s: float = 120.0
    limits: Limits = Limits()


class Pool:
    """Everything of the pool put together. `run` returns the process's exit code.

    ``lifeline`` is one end of a socket pair whose other end only the arbiter holds: its end means stop at once. With a
    lifeline, INT and TERM are the arbiter's business (they reach the whole group on Ctrl-C and on some platforms, and
    open streams still need the workers); without, they drain.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        rendezvous: Rendezvous,
        options: PoolOptions,
        *,
        display: Display,
        lifeline: socket.socket | None = None,
        start_life: Callable[[WorkerConfig], Life] = Incarnation,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._rendezvous = rendezvous
        self._display = display
        self._lifeline = lifeline
        self._clock = clock
        self._clients: set[Client] = set()
        self._selector = selectors.DefaultSelector()
        self._supervisor = Supervisor(
            configs,
            limits=options.limits,
            event=lambda worker, event: self._broker.event(worker, event),
            lost=lambda worker: self._broker.worker_lost(worker),
            busy=lambda worker: self._broker.jobs_of(worker) > 0,
            watch=self._watch_worker,
            unwatch=self._unwatch_worker,
            start_life=start_life,
            clock=clock,
        )
        self._broker = Broker(
            self._supervisor.workers,
            send=self._supervisor.send,
            hopeless=lambda: self._supervisor.hopeless,
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_replays=options.max_replays,
            clock=clock,
        )
        self._signals = SignalPipe()
        self._fatal: str | None = None
        self._stop_at: float | None = None
        self._stopping = False
        self._accept_at: float | None = None
        self._check_socket_at = 0.0
        self._status_at = 0.0
        self._announced = False

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to stop, or until the model turns out to be impossible to serve."""
        select = self._selector
        select.register(self._rendezvous, selectors.EVENT_READ, self._accept)
        if self._lifeline is not None:
            self._lifeline.setblocking(False)
            select.register(self._lifeline, selectors.EVENT_READ, self._read_lifeline)
        select.register(self._signals, selectors.EVENT_READ, self._read_signals)
        try:
            while not (self._stopping and self._supervisor.stopped):
                self._turn()
        finally:
            self._supervisor.kill()
            self._display.close()
            for client in list(self._clients):
                self._drop(client)
            self._rendezvous.close()
            self._signals.close()
            select.close()
        if self._fatal is not None:
            self._tell_arbiter(self._fatal)
            return EXIT_FATAL
        return EXIT_OK

    def _turn(self) -> None:
        """Wait for something to happen, take all of it in, then send out what follows from it."""
        self._supervisor.tend()
        for key, ready in self._selector.select(self._seconds_to_next()):
            owner = key.data
            if isinstance(owner, Client):
                self._serve(owner, ready)
            elif isinstance(owner, ModelWorker):
                self._supervisor.read(owner)
            else:
                owner()
        now = self._clock()
        self._broker.dispatch()
        self._keep_time(now)
        for client in list(self._clients):
            self._guarded(client, client.flush_events, now)
        if self._supervisor.changed and now >= self._status_at:
            self._supervisor.changed = False
            self._status_at = now + _STATUS_PAUSE_S
            self._publish(now)
        self._watch_clients()

    def _seconds_to_next(self) -> float:
        """Return how long the selector may wait; at most a second."""
        seconds = self._supervisor.seconds_to_next()
        if self._supervisor.changed:
            seconds = max(0.0, min(seconds, self._status_at - self._clock()))
        return seconds

    def _keep_time(self, now: float) -> None:
        """Do what is due by the clock."""
        for client in self._clients.copy():
            self._guarded(client, client.check_patience, now)
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._selector.register(self._rendezvous, selectors.EVENT_READ, self._accept)
        if now >= self._check_socket_at:
            self._check_socket_at = now + _CHECK_SOCKET_S
            self._check_rendezvous()
        if self._stopping:
            return
        if (failure := self._supervisor.failure) is not None:
            self._fatal = failure
            self._stop("No model worker is running.")
        elif self._stop_at is not None and (now >= self._stop_at or (self._broker.draining and not self._unfinished)):
            self._stop("The server is shutting down.")

    @property
    def _unfinished(self) -> bool:
        """Whether a drain still has something to wait for: jobs, or bytes that a client has not read yet."""
        return bool(
            self._broker.queued
            or self._broker.running
            or any(client.pending or client.events for client in self._clients)
        )

    def _stop(self, message: str) -> None:
        """Answer what is left and let the workers go; the loop ends when their processes have."""
        if self._stopping:
            return
        self._stopping = True
        self._broker.draining = True
        self._broker.fail_all(message, retry_after=5.0)
        self._supervisor.stop()
        self._supervisor.changed = True

    # --- signals and the arbiter --------------------------------------------------------------------------------------

    def _read_signals(self) -> None:
        for number in self._signals.read():
            if number == signal.SIGCHLD:
                self._supervisor.reap()
            else:
                self._asked_to_stop(signal.Signals(number).name)

    def _asked_to_stop(self, name: str) -> None:
        if self._lifeline is not None:
            if self._stop_at is None:
                # Whoever really means us alone gets what they want too, only later.
                self._stop_at = self._clock() + self._options.drain_s + _ARBITER_MARGIN_S
                log.info("%s noted: the arbiter decides when to stop", name)
        elif self._stop_at is None:
            log.info("%s: draining, at most %.0f s", name, self._options.drain_s)
            self._broker.draining = True
            self._stop_at = self._clock() + self._options.drain_s
            self._supervisor.changed = True
        else:
            log.info("%s again: stopping now", name)
            self._stop("The server is shutting down.")

    def _read_lifeline(self) -> None:
        """Its end: the arbiter has stopped us, or is dead. Either way nobody needs the answers any more."""
        assert self._lifeline is not None
        try:
            if self._lifeline.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._selector.unregister(self._lifeline)
        log.info("the arbiter is gone or has let go: stopping")
        self._stop("The server is shutting down.")

    def _tell_arbiter(self, message: str) -> None:
        line = " ".join(message.split())
        log.error("giving up: %s", line)
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                self._lifeline.send(f"FATAL {line}\n".encode())

    # --- clients ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection = self._rendezvous.accept()
        except OSError as error:
            log.error("cannot accept connections: %s", error.strerror)
            self._selector.unregister(self._rendezvous)
            self._accept_at = self._clock() + _ACCEPT_PAUSE_S
            return
        if connection is None:
            return
        if len(self._clients) >= self._options.max_clients:
            log.error("refused a connection: %d are open", len(self._clients))
            connection.close()
            return
        client = Client(
            connection,
            max_pending=self._options.client_pending_bytes,
            patience_s=self._options.client_patience_s,
        )
        self._clients.add(client)
        self._selector.register(client, selectors.EVENT_READ, client)
        self._guarded(client, client.send, encode(self.status()), self._clock())

    def _serve(self, client: Client, ready: int) -> None:
        if client not in self._clients:
            return  # cut off earlier in this turn
        if ready & selectors.EVENT_WRITE:
            self._guarded(client, client.write_pending, self._clock())
        if ready & selectors.EVENT_READ and client in self._clients:
            self._guarded(client, self._hear, client)

    def _hear(self, client: Client) -> None:
        """Take in what ``client`` says. Raises `Gone`."""
        for message in client.read():
            if isinstance(message, Cancel):
                self._broker.cancel(client, message)
            elif isinstance(message, StatusQuery):
                client.send(encode(self.status()), self._clock())
            elif not self._broker.submit(client, message):
                raise Gone("used a job's id twice")

    def _guarded(self, client: Client, action: Callable[..., None], *args: object) -> None:
        """Do something with a client; if it turns out to be gone, everything that it wanted is cancelled."""
        try:
            action(*args)
        except Gone as gone:
            if str(gone):
                log.error("disconnected an HTTP worker: it %s", gone)
            self._drop(client)

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        self._broker.client_gone(client)
        self._selector.unregister(client)
        client.close()

    def _watch_clients(self) -> None:
        """Ask to be woken when a client with pending bytes can take more."""
        for client in self._clients:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.pending else 0)
            if self._selector.get_key(client).events != events:
                self._selector.modify(client, events, client)

    # --- workers ------------------------------------------------------------------------------------------------------

    def _watch_worker(self, worker: ModelWorker) -> None:
        if worker.life is not None:
            self._selector.register(worker.life.fileno(), selectors.EVENT_READ, worker)

    def _unwatch_worker(self, worker: ModelWorker) -> None:
        if worker.life is not None:
            self._selector.unregister(worker.life.fileno())

    # --- what others see ----------------------------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        """Return the state of the pool."""
        return PoolStatus(
            ready=self._supervisor.can_answer and not self._broker.draining,
            draining=self._broker.draining,
            queued=self._broker.queued,
            running=self._broker.running,
            card_path=self._supervisor.card_path,
            workers=self._supervisor.statuses(self._broker.jobs_of),
        )

    def _publish(self, now: float) -> None:
        """Tell everybody that something has changed."""
        status = self.status()
        frame = encode(status)
        for client in list(self._clients):
            self._guarded(client, client.send, frame, now)
        self._display.show(status.workers)
        if status.ready and not self._announced:
            self._announced = True
            self._display.ready()

    def _check_rendezvous(self) -> None:
        if self._accept_at is None and self._rendezvous.lost:
            log.warning("%s has vanished: listening there again", self._rendezvous.path)
            self._selector.unregister(self._rendezvous)
            self._rendezvous.renew()
            self._selector.register(self._rendezvous, selectors.EVENT_READ, self._accept)
