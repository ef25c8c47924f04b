"""The pool's loop: one selector over clients, workers, signals and the lifeline, and no other waiting."""

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from config import logs
from workers.config import WorkerConfig
from workers.messages import (
    Attach,
    Cancel,
    ClientMessage,
    Failed,
    GenerateJob,
    Job,
    Keep,
    LogAs,
    PoolCounters,
    PoolStatus,
    StatusQuery,
    WorkerStatus,
)
from workers.pool.broker import Broker
from workers.pool.client import Client, Gone
from workers.pool.clients import Clients
from workers.pool.incarnation import Incarnation, Life
from workers.pool.model_worker import Limits, ModelWorker
from workers.pool.rendezvous import Rendezvous
from workers.pool.room import Room
from workers.pool.rooms import GIVEN_UP, Rooms
from workers.pool.signals import SignalPipe
from workers.pool.supervisor import Supervisor
from workers.wire import encode

log = logs.logger("tailrace.pool")

EXIT_OK = 0
# The model could not be loaded, again and again, for reasons that may pass: systemd tries the service again.
EXIT_GIVEN_UP = 1
# What the operator's configuration makes impossible. Never 3 or 4, which mean something to gunicorn.
EXIT_FATAL = 2

_ARBITER_MARGIN_S = 15.0
_STATUS_PAUSE_S = 0.1
# How often somebody is told how things are, also if nothing changes.
_TELL_PAUSE_S = 1.0
# How long the clocks may go without a look while there are tokens all the time.
_LOOK_S = 0.1


class Display(Protocol):
    """Who shows people how loading goes."""

    def show(self, workers: Sequence[WorkerStatus]) -> None: ...
    def ready(self) -> None: ...
    def close(self) -> None: ...


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the pool. ``client_pending_bytes`` must hold a burst of embeddings; times are in seconds.

    ``drain_s``: how long running jobs may go on when a pool of its own (without a lifeline) is told to stop;
    ``resume_window_s``: how long kept requests wait for a reader.
    """

    max_batch: int = 32
    max_queue: int = 256
    max_queue_tokens: int = 1_000_000
    queue_timeout_s: float = 0.0
    max_replays: int = 3
    max_clients: int = 1024
    client_pending_bytes: int = 64 * 1024 * 1024
    client_patience_s: float = 30.0
    drain_s: float = 120.0
    resume_window_s: float = 300.0
    limits: Limits = Limits()


class Pool:
    """Everything of the pool put together. `run` returns the process's exit code; the arbiter is told it as well.

    ``lifeline`` is one end of a socket pair whose other end only the arbiter holds: its end means stop at once. With a
    lifeline, INT and TERM are the arbiter's business (they reach the whole group on Ctrl-C and on some platforms, and
    open streams still need the workers); without, they drain. ``tell`` hears how things are at each change, and about
    once a second; that the loop turns is part of the news.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        rendezvous: Rendezvous,
        options: PoolOptions,
        *,
        display: Display,
        lifeline: socket.socket | None = None,
        tell: Callable[[PoolStatus], None] = lambda status: None,
        reload: Callable[[], LogAs | None] = lambda: None,
        start_life: Callable[[WorkerConfig], Life] = Incarnation,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._display = display
        self._lifeline = lifeline
        self._tell = tell
        self._reload = reload
        self._tell_at = 0.0
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._counts = PoolCounters()
        self._supervisor = Supervisor(
            configs,
            limits=options.limits,
            events=lambda worker, events: self._broker.take(worker, events),
            lost=lambda worker: self._broker.worker_lost(worker),
            busy=lambda worker: self._broker.awaits_word_of(worker),
            watch=self._watch_worker,
            unwatch=self._unwatch_worker,
            start_life=start_life,
            counts=self._counts,
            clock=clock,
        )
        self._broker = Broker(
            self._supervisor.workers,
            send=self._supervisor.send,
            hopeless=lambda: self._supervisor.hopeless,
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_queue_tokens=options.max_queue_tokens,
            queue_timeout_s=options.queue_timeout_s,
            max_replays=options.max_replays,
            counts=self._counts,
            clock=clock,
        )
        self._rooms = Rooms(self._broker, window_s=options.resume_window_s, clock=clock)
        self._clients = Clients(
            rendezvous,
            self._selector,
            most=options.max_clients,
            max_pending=options.client_pending_bytes,
            patience_s=options.client_patience_s,
            greet=lambda client: client.send(encode(self.status()), self._clock()),
            hear=self._hear,
            gone=self._client_gone,
        )
        self._signals = SignalPipe()
        # Why it gives up, and the exit code that says whether for good.
        self._given_up: tuple[str, int] | None = None
        self._stop_at: float | None = None
        self._stopping = False
        self._look_at = 0.0
        self._status_at = 0.0
        self._announced = False

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to stop, or until the model turns out to be impossible to serve."""
        select = self._selector
        self._clients.open()
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
            self._clients.close()
            self._signals.close()
            select.close()
        if self._given_up is None:
            return EXIT_OK
        self._tell_arbiter(*self._given_up)
        return self._given_up[1]

    def _turn(self) -> None:
        """Wait for something to happen, take all of it in, then send out what follows from it.

        Most turns bring a step's tokens and nothing else. Those do not look at every clock and every state.
        """
        happened = self._selector.select(self._seconds_to_next())
        tokens_only = bool(happened)
        for key, ready in happened:
            owner = key.data
            if isinstance(owner, ModelWorker):
                self._supervisor.read(owner)
                continue
            tokens_only = False
            if isinstance(owner, Client):
                self._clients.serve(owner, ready, self._clock())
            else:
                owner()
        now = self._clock()
        if not tokens_only or self._supervisor.changed or self._broker.draining or now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._supervisor.tend()
            self._broker.dispatch()
            self._keep_time(now)
        elif self._broker.queued:
            self._broker.dispatch()
        self._rooms.pump()
        self._clients.flush(now)
        if self._supervisor.changed and now >= self._status_at:
            self._supervisor.changed = False
            self._status_at = now + _STATUS_PAUSE_S
            self._publish(now)
        elif now >= self._tell_at:
            self._tell_at = now + _TELL_PAUSE_S
            self._tell(self.status())
        self._clients.watch()

    def _seconds_to_next(self) -> float:
        """Return how long the selector may wait; at most a second."""
        if self._rooms.busy:
            return 0.0
        seconds = min(self._supervisor.seconds_to_next(), self._broker.seconds_to_next())
        if self._supervisor.changed:
            seconds = max(0.0, min(seconds, self._status_at - self._clock()))
        return seconds

    def _keep_time(self, now: float) -> None:
        """Do what is due by the clock."""
        self._clients.tend(now)
        self._rooms.tend(now)
        if self._stopping:
            return
        if (failure := self._supervisor.failure) is not None:
            self._given_up = failure, EXIT_FATAL if self._supervisor.failed_for_good else EXIT_GIVEN_UP
            self._stop("No model worker is running.")
        elif self._stop_at is not None and (now >= self._stop_at or (self._broker.draining and not self._unfinished)):
            self._stop("The server is shutting down.")

    @property
    def _unfinished(self) -> bool:
        """Whether a drain still has something to wait for: jobs, or bytes that a client has not read yet."""
        return bool(self._broker.queued or self._broker.running or self._clients.have_unread or self._rooms.busy)

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
            elif number == signal.SIGHUP:
                if log_as := self._reload():
                    self._supervisor.tell_all(log_as)
            else:
                self._asked_to_stop(signal.Signals(number).name)

    def _asked_to_stop(self, name: str) -> None:
        if self._lifeline is not None:
            if self._stop_at is None:
                # Whoever really means us alone gets what they want too, only later.
                self._stop_at = self._clock() + self._options.drain_s + _ARBITER_MARGIN_S
                log.info("signal noted: the arbiter decides when to stop", signal=name)
        elif self._stop_at is None:
            log.info("draining", signal=name, at_most_s=self._options.drain_s)
            self._broker.draining = True
            self._stop_at = self._clock() + self._options.drain_s
            self._supervisor.changed = True
            self._tell(self.status())
        else:
            log.info("told again: stopping now", signal=name)
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

    def _tell_arbiter(self, message: str, code: int) -> None:
        line = " ".join(message.split())
        log.error("giving up", reason=line)
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                self._lifeline.send(f"FATAL {code} {line}\n".encode())

    # --- clients ------------------------------------------------------------------------------------------------------

    def _hear(self, client: Client, message: ClientMessage) -> None:
        """Take in what ``client`` says. Raises `Gone`."""
        if isinstance(message, Cancel):
            if not self._rooms.cancel(client, message):
                self._broker.cancel(client, message)
        elif isinstance(message, StatusQuery):
            client.send(encode(self.status()), self._clock())
        elif isinstance(message, Keep):
            client.post(self._rooms.keep(client, message))
        elif isinstance(message, Attach):
            self._rooms.attach(client, message)
        elif isinstance(message, GenerateJob) and message.kept:
            room = self._rooms.room_for(client, message)
            if room is None:
                client.post(Failed(id=message.id, kind="unavailable", message=GIVEN_UP))
            else:
                self._submit(room, message)
        else:
            self._submit(client, message)

    def _submit(self, owner: Client | Room, job: Job) -> None:
        if not self._broker.submit(owner, job):
            raise Gone("used a job's id twice")

    def _client_gone(self, client: Client) -> None:
        """Nobody is left to read the answers on this connection."""
        self._rooms.client_gone(client)
        self._broker.client_gone(client)

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
            queued_tokens=self._broker.queued_tokens,
            kept=len(self._rooms),
            tokens_per_second=self._broker.tokens_per_second,
            counters=msgspec.structs.replace(self._counts),
        )

    def _publish(self, now: float) -> None:
        """Tell everybody that something has changed."""
        status = self.status()
        self._clients.broadcast(encode(status), now)
        self._display.show(status.workers)
        self._tell_at = now + _TELL_PAUSE_S
        self._tell(status)
        if status.ready and not self._announced:
            self._announced = True
            self._display.ready()
