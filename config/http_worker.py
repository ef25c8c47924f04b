"""gunicorn's gevent worker with an orderly end.

Not part of the application: the arbiter imports this module, and must not import the application, which each HTTP
worker loads anew after a reload.

The stock worker, told to stop, closes its listening socket whatever for: new clients are refused without a word while
the last streams run. It waits for idle kept-alive connections as for busy ones, and it ends its last requests in the
very second in which the arbiter kills it, so that no ``finally`` of theirs runs. This one tells two ends apart:

- **The service stops** (`config.arbiter` says so before it sends TERM). The inherited listening sockets stay open,
  though the arbiter's are closed: whoever comes is told by the application that the service is stopping. Running
  requests have the graceful timeout, and then get an end that their clients can see.
- **A successor has taken over** (a reload, or TERM to this process alone). The listening socket is the successor's; the
  requests that are here run to their end, however long. Idle connections have a few seconds more: whoever uses one all
  the time is told with the next answer to open another; closed at once, it could cross a request, which would be lost.

It also closes a connection whose request was answered before its body had been read, where the stock worker would read
the rest, however long; and what is no HTTP gets an error as JSON, which quotes nothing of it.
"""

import contextlib
import errno
import json
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import gevent
from gevent import socket
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.http import errors
from gunicorn.util import write_nonblock
from gunicorn.workers.ggevent import GeventWorker

from config import logs
from config.logs import request_label

log = logs.logger("tailrace.http")

# How often it looks whether it has to end, and how soon it does; its heartbeat too.
_LOOK_S = 0.2
# So long newcomers are told at least that the service stops; and so long a worker that is to leave looks whether the
# whole service stops, since a signal to the whole group comes before the arbiter has said so.
_FAREWELL_S = 1.0
_IDLE_AFTER_RELOAD_S = 5.0
_LONGEST_MARGIN_S = 5.0
# For the last words to get out when nothing is waited for.
_LAST_WORDS_S = 1.0
# Descriptors that are no connections: the line to the pool, the store, logs, files being read. Without them a worker
# whose connections have used up the rest could accept no more and answer nothing.
_OTHER_DESCRIPTORS = 48
_FEWEST_CONNECTIONS = 8
# How long, and how many bytes, a client may go on sending a body that nobody wants: a connection that is closed
# over unread bytes is reset, and the answer on it lost.
_LINGER_S = 2.0
_LINGER_BYTES = 256 * 1024

# What a client can do wrong before there is a request, as status and words of ours. The first that fits counts.
_NO_REQUEST: list[tuple[type[Exception], int, str, str]] = [
    (errors.LimitRequestLine, 414, "URI Too Long", "The URL is too long."),
    (
        errors.LimitRequestHeaders,
        431,
        "Request Header Fields Too Large",
        "The request has too many headers, or too long ones.",
    ),
    (errors.UnsupportedTransferCoding, 501, "Not Implemented", "This transfer coding is not supported."),
    (errors.ExpectationFailed, 417, "Expectation Failed", "This expectation cannot be met."),
    (errors.ParseException, 400, "Bad Request", "The request is not valid HTTP."),
]
# These are said of an answer, and so are a fault of ours.
_OF_ANSWERS = (errors.InvalidResponseHeader, errors.InvalidResponseHeaderName)


class _IdleWait(gevent.Timeout):  # type: ignore[misc]
    """The time in which a connection waits for its next request, known to the worker while it lasts.

    With the first byte of the request begins another time, the one in which all of its headers must be there.
    """

    def __init__(self, waiting: dict["_IdleWait", Any], seconds: float, headers_s: float) -> None:
        super().__init__(seconds, False)
        self._waiting = waiting
        self._headers_s: float | None = headers_s
        self.since = time.monotonic()

    def __enter__(self) -> "_IdleWait":
        super().__enter__()
        self._waiting[self] = greenlet = gevent.getcurrent()
        _WAITS[greenlet] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._waiting.pop(self, None)
        _WAITS.pop(gevent.getcurrent(), None)
        ended: bool | None = super().__exit__(kind, value, trace)
        return ended

    def begun(self) -> None:
        """Some of the request has come."""
        greenlet = self._waiting.get(self)
        if greenlet is not None and self._headers_s is not None:
            self._end_in(greenlet, self._headers_s)
            self._headers_s = None

    def end_now(self) -> None:
        """As if the time were over. Not by killing the greenlet, which might have its request by then."""
        greenlet = self._waiting.pop(self, None)
        if greenlet is not None:
            self._end_in(greenlet, 0)

    def _end_in(self, greenlet: Any, seconds: float) -> None:
        self.cancel()
        self.timer.close()
        self.timer: Any = gevent.get_hub().loop.timer(seconds)
        self.timer.start(greenlet.throw, self)


# Of the connections that wait for a request, by their greenlets.
_WAITS: dict[Any, _IdleWait] = {}


class ClientSocket(socket.socket):  # type: ignore[misc]
    """A connection to a client. Each token is one `sendall`, so the usual case, that the kernel takes it, is quick."""

    def recv(self, *args: Any) -> Any:
        """Return what has come, waiting for it. Raises OSError."""
        data = super().recv(*args)
        wait = _WAITS.get(gevent.getcurrent())
        if wait is not None:
            wait.begun()
        return data

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of ``data``. Raises OSError."""
        try:
            sent = self._sock.send(data, flags)
        except BlockingIOError:
            sent = 0
        except TimeoutError as error:
            raise _departed(error) from None
        if sent < len(data):
            try:
                super().sendall(memoryview(data)[sent:], flags)
            except TimeoutError as error:
                raise _departed(error) from None


def _departed(error: TimeoutError) -> OSError:
    """The kernel has given the client up: to gunicorn, which would log it with a traceback, an ordinary departure."""
    return ConnectionResetError(errno.ECONNRESET, str(error))


class Doorway(StreamServer):  # type: ignore[misc]
    """Accepts connections; when it cannot, says so in a line, and tries again after a pause that grows to a second."""

    def do_read(self) -> Any:
        """Return a connection, or None if there is none (any more)."""
        try:
            return super().do_read()
        except OSError as error:
            if self.is_fatal_error(error):
                raise
            log.error("cannot accept connections", reason=error.strerror)
            self.stop_accepting()
            self._timer = self.loop.timer(self.delay)
            self._timer.start(self._start_accepting_if_started)
            self.delay: float = min(self.max_delay, self.delay * 2)
            return None


class HttpWorker(GeventWorker):  # type: ignore[misc]
    """Serves the Flask application; see the module's text for how it ends.

    When the service stops, with a graceful timeout of G seconds and a margin M = min(5, G/4): streams still open at
    G - 2M are ended by the application with an error event, requests still running at G - M are ended by force (their
    ``finally`` runs), and at G the arbiter kills what is left.
    """

    # Both set by the arbiter right after the fork. Without an arbiter of ours every end is a stop of the service.
    service_stops: Callable[[], bool] = staticmethod(lambda: True)
    # By systemd, which goes on listening: who comes now waits for the next service.
    sockets_are_lent = False
    # How long the headers of a request may take; set after the fork too.
    receive_timeout_s = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: dict[_IdleWait, Any] = {}
        self._running = 0
        self._main: Any = None

    # --- connections and requests

    def timeout_ctx(self) -> _IdleWait:
        """Called by gunicorn about each wait for a request."""
        return _IdleWait(self._waiting, self.cfg.keepalive, self.receive_timeout_s)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one connection."""
        if type(client) is socket.socket:  # and not TLS
            client = ClientSocket(client.family, client.type, client.proto, fileno=client.detach())
        super().handle(listener, client, addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """Answer one request."""
        # Asked when the headers go out.
        may_close = req.should_close
        req.should_close = lambda: may_close() or _unread(req)
        if not self.alive and self.service_stops():
            self._tell_application("refuse_requests")
        self._running += 1
        try:
            super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            if _unread(req):
                _linger(sock)
            raise
        finally:
            self._running -= 1
            request_label.set("")

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what was no request, or a fault of ours outside of the application."""
        if isinstance(exc, gevent.GreenletExit):
            return  # an idle connection when this process ends
        status, reason, message = _what_went_wrong(exc)
        if status == 500:
            log.error("unexpected error at a connection", exc_info=exc)
        else:
            log.info("no request", kind=type(exc).__name__, address=addr[0] if addr else "a socket")
        kind_of_error = "server_error" if status == 500 else "invalid_request_error"
        error = {"message": message, "type": kind_of_error, "param": None, "code": None}
        body = json.dumps({"error": error})
        head = f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n\r\n"
        with contextlib.suppress(OSError):
            write_nonblock(client, (head + body).encode())
            _linger(client)

    # --- life

    def run(self) -> None:
        """Serve until told to stop."""
        self._main = gevent.getcurrent()
        gevent.get_hub().print_exception = _uncaught_in_greenlet
        most = min(self.worker_connections, _descriptors() - _OTHER_DESCRIPTORS)
        doors = []
        for each in self.sockets if self.alive else ():
            each.setblocking(1)
            door = Doorway(each, handle=partial(self.handle, each), spawn=Pool(max(_FEWEST_CONNECTIONS, most)))
            if self.cfg.workers > 1:
                door.max_accept = 1  # and the next one to another worker
            door.start()
            doors.append(door)
        while self.alive:
            self.notify()
            gevent.sleep(_LOOK_S)
        self._end(doors)
        self._tell_application("close")

    def notify(self) -> None:
        """Show the arbiter that this process runs; without an arbiter, end: another one may come, and listen here."""
        self.tmp.notify()
        if self.ppid != os.getppid():
            log.error("the arbiter is gone: ending")
            self._end_now()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """INT or QUIT: streams are told, nothing is waited for."""
        self.alive = False
        gevent.spawn(self._end_now)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """ABRT, because of a blocked loop: what blocks it is thrown out, so that the other requests get to know."""
        self.alive = False
        gevent.spawn(self._end_now, 1)
        if gevent.getcurrent() is not self._main:
            raise gevent.GreenletExit

    def _end(self, doors: list[Doorway]) -> None:
        """Let what runs here come to its end; returns when nothing does."""
        told = time.monotonic()
        graceful = float(self.cfg.graceful_timeout)
        margin = min(_LONGEST_MARGIN_S, graceful / 4)
        stop: float | None = None
        streams_ended = False
        while True:
            now = time.monotonic()
            if stop is None and self.service_stops():
                stop = now
                self._tell_application("refuse_requests")
            if stop is None:
                if now - told >= _FAREWELL_S:
                    _close(doors)
                self._end_idle(told, now)
            else:
                if self.sockets_are_lent:
                    _close(doors)
                if now - stop >= graceful - 2 * margin and not streams_ended:
                    streams_ended = True
                    self._tell_application("end_streams")
                if now - stop >= graceful - margin:
                    log.warning("requests did not end in time", requests=self._running)
                    break
            busy = self._running or getattr(self.wsgi, "is_busy", False)
            idle = stop is None and any(door.pool for door in doors)
            if not busy and not idle and now - told >= _FAREWELL_S:
                break
            self.notify()
            gevent.sleep(_LOOK_S)
        for door in doors:
            door.stop(timeout=0)

    def _end_idle(self, told: float, now: float) -> None:
        """Close connections without a request for so long after the reload."""
        for wait in list(self._waiting):
            if now - max(told, wait.since) >= _IDLE_AFTER_RELOAD_S:
                wait.end_now()

    def _end_now(self, code: int = 0) -> None:
        self._tell_application("end_streams")
        deadline = time.monotonic() + _LAST_WORDS_S
        while self._running and time.monotonic() < deadline:
            gevent.sleep(0.02)
        # Not sys.exit, as gunicorn does: the main greenlet may be on its way out too, and would show a traceback.
        os._exit(code)

    def _tell_application(self, what: str) -> None:
        """Call the application's method of that name, if it has one."""
        method = getattr(self.wsgi, what, None)
        if method is not None:
            method()


def _close(doors: list[Doorway]) -> None:
    for door in doors:
        door.close()


def _descriptors() -> int:
    """Return how many this process may have open, after asking for all that it may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def _uncaught_in_greenlet(_: Any, kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    """In place of gevent's own words on standard error, which quote what the exception says."""
    log.error("uncaught exception", exc_info=(kind, error, trace))


def _what_went_wrong(error: BaseException) -> tuple[int, str, str]:
    """Return status, reason and message."""
    if not isinstance(error, _OF_ANSWERS):
        for kind, status, reason, message in _NO_REQUEST:
            if isinstance(error, kind):
                return status, reason, message
    return 500, "Internal Server Error", "The server had an error while processing the request."


def _unread(request: Any) -> bool:
    """Whether something of the request's body has not been read, so that the next request cannot be found."""
    body = request.body
    if body is None:
        return False
    if body.buf.tell() or getattr(body, "failed", False):
        return True
    reader = body.reader
    return bool(getattr(reader, "length", 0)) or getattr(reader, "parser", None) is not None


def _linger(connection: Any) -> None:
    """Say that no more will come, and read away what the client still sends, for a moment."""
    with contextlib.suppress(OSError, ValueError):
        connection.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + _LINGER_S, _LINGER_BYTES
        while left > 0 and (seconds := deadline - time.monotonic()) > 0:
            connection.settimeout(seconds)
            data = connection.recv(min(left, 65536))
            if not data:
                return
            left -= len(data)
