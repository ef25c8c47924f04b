"""gunicorn's gevent worker with an orderly end.

Not part of the application: the arbiter imports this module, and must not import the application, which each HTTP
worker loads anew after a reload.

The stock worker, told to stop, waits for idle kept-alive connections as for busy ones, up to the whole graceful
timeout; and it ends its last requests in the very second in which the arbiter kills it, so that no ``finally`` of
theirs runs. This one closes idle connections at once, and gives the last requests an end that their clients can see.
"""

import os
from types import TracebackType
from typing import Any

import gevent
from gunicorn.workers.ggevent import GeventWorker

# A connection that was accepted in the moment of TERM may still send its request.
_LAST_REQUEST_S = 1.0
_LOOK_S = 0.2
_LONGEST_MARGIN_S = 5.0
# For the last bytes to leave.
_LAST_WORDS_S = 0.1


class _IdleWait(gevent.Timeout):  # type: ignore[misc]
    """The time in which a connection waits for its next request, known to the worker while it lasts."""

    def __init__(self, waiting: dict["_IdleWait", Any], seconds: float) -> None:
        super().__init__(seconds, False)
        self._waiting = waiting

    def __enter__(self) -> "_IdleWait":
        super().__enter__()
        self._waiting[self] = gevent.getcurrent()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._waiting.pop(self, None)
        ended: bool | None = super().__exit__(kind, value, trace)
        return ended

    def end_now(self) -> None:
        """As if the time were over."""
        greenlet = self._waiting.get(self)
        if greenlet is not None:
            greenlet.kill(self, block=False)


class HttpWorker(GeventWorker):  # type: ignore[misc]
    """Serves the Flask application; see the module's text for how it ends.

    With a graceful timeout of G seconds and a margin M = min(5, G/4): streams still open at G - 2M are ended by the
    application with an error event, requests still running at G - M are ended by force (their ``finally`` runs), and at
    G the arbiter kills what is left.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: dict[_IdleWait, Any] = {}

    def timeout_ctx(self) -> _IdleWait:
        """Called by gunicorn about each wait for a request."""
        return _IdleWait(self._waiting, self.cfg.keepalive if self.alive else _LOOK_S)

    def run(self) -> None:
        """Serve until told to stop."""
        graceful = float(self.cfg.graceful_timeout)
        margin = min(_LONGEST_MARGIN_S, graceful / 4)
        # Our own copy of the configuration: the arbiter keeps its clock.
        self.cfg.set("graceful_timeout", int(graceful - margin))
        gevent.spawn(self._end_in_order, graceful - 2 * margin)
        super().run()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """INT or QUIT: streams are told, nothing is waited for."""
        self.alive = False
        gevent.spawn(self._end_now)

    def _end_now(self) -> None:
        self._end_streams()
        gevent.sleep(_LAST_WORDS_S)
        # Not sys.exit, as gunicorn does: the main greenlet may be on its way out too, and would show a traceback.
        os._exit(0)

    def _end_in_order(self, seconds: float) -> None:
        while self.alive:
            gevent.sleep(_LOOK_S)
        gevent.sleep(min(_LAST_REQUEST_S, seconds))
        for wait in list(self._waiting):
            wait.end_now()
        gevent.sleep(max(0.0, seconds - _LAST_REQUEST_S))
        self._end_streams()

    def _end_streams(self) -> None:
        end_streams = getattr(self.wsgi, "end_streams", None)
        if end_streams is not None:
            end_streams()
