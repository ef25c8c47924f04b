"""The HTTP side of Tailrace: a Flask application that turns text into tokens, asks the pool, and tokens into text.

It never imports torch or transformers; the model lives in other processes (``workers/``).
"""

import time
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from flask import Flask, Response, g, request

from app.api import chat, completions, embeddings, health, life, metrics, models, scoring, stored, streams
from app.api.keeping import close_store
from app.api.messages import routes as messages
from app.api.reference import routes as reference
from app.api.responses import routes as responses
from app.api.responses.running import background_work
from app.api.service import Service, service, warnings_header
from app.api.status import routes as status
from app.door.gate import guest_of
from app.door.keys import PAGES
from app.door.visitor import VisitorsAnswer
from app.errors import as_api_error, register_error_handlers
from app.text.errors import ShuttingDown
from config import settings as configuration

# What is still answered while the service stops: whoever watches over it shall see how that goes.
WHILE_STOPPING = PAGES | {"/livez", "/readyz", "/health", "/metrics"}


class Application(Flask):
    """A Flask application behind a door, that can be told to come to an end."""

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        """Answer one request, if the door lets it in: nothing of the application sees one that was not let in."""
        owner: Service = self.extensions["tailrace"]
        refusal = owner.door.look(environ)
        guest = guest_of(environ)
        if refusal is None and owner.draining and environ["PATH_INFO"] not in WHILE_STOPPING:
            refusal = owner.door.refuse(as_api_error(ShuttingDown()), environ)
        if refusal is not None:
            owner.meter.refused_at_door(environ["REQUEST_METHOD"], refusal.status_code)
            life.refused_at_door(environ["REQUEST_METHOD"], refusal.status_code, known=bool(guest.owner))
            guest.leave()
            return refusal(environ, start_response)
        try:
            answer = super().wsgi_app(environ, start_response)
        except BaseException:
            guest.leave()
            raise
        return VisitorsAnswer(answer, guest)

    def handle_user_exception(self, e: Exception) -> Any:
        """Count what a request fails for; the answer is made by `app.errors`."""
        owner: Service = self.extensions["tailrace"]
        owner.meter.failed(e, g.get("stream"))
        return super().handle_user_exception(e)

    def refuse_requests(self) -> None:
        """Answer every new request 503, but for those that watch over the service; what runs goes on.

        For the HTTP worker, when the service stops; may be called any number of times, and never blocks.
        """
        owner: Service = self.extensions["tailrace"]
        owner.draining = True

    def end_streams(self) -> None:
        """Take no more requests and end those that are open with an error that their clients can see; never blocks.

        For the HTTP worker, to be called shortly before it stops by force.
        """
        owner: Service = self.extensions["tailrace"]
        owner.drain()

    @property
    def is_busy(self) -> bool:
        """Whether something goes on that no client waits for: responses in the background."""
        return bool(background_work(self.extensions))

    def close(self) -> None:
        """Give the files back, as the last thing."""
        close_store(self.extensions)
        owner: Service = self.extensions["tailrace"]
        owner.meter.close()


def create_app(settings: configuration.Settings | None = None) -> Application:
    """Return the WSGI application; without ``settings`` they are read from the environment and the configuration file.

    The line to the pool is opened at once and kept up. Raises `config.settings.ConfigError` for bad settings.
    """
    app = Application(__name__, static_folder=None)
    # "//v1/models" is no other spelling of a URL; it is 404 as JSON, not a redirect.
    app.url_map.merge_slashes = False
    owner = Service(settings or configuration.load())
    app.extensions["tailrace"] = owner
    for part in (chat, completions, embeddings, messages, responses, stored, streams, models, scoring):
        app.register_blueprint(part.blueprint)
    for part in (reference, health, metrics, status):
        app.register_blueprint(part.blueprint)
    register_error_handlers(app)
    app.before_request(_name_request)
    app.after_request(_finish_response)
    app.teardown_request(_release)
    owner.pool.start()
    owner.meter.start()
    return app


def _name_request() -> None:
    g.request_id = guest_of(request.environ).request_id
    g.begun = time.monotonic()


def _finish_response(response: Response) -> Response:
    owner = service()
    rule = request.url_rule
    owner.meter.http_request(None if rule is None else rule.rule, request.method, response.status_code)
    life.answered(response, g.get("begun", 0.0))
    owner.door.dress(response, guest_of(request.environ))
    warnings = warnings_header()
    if warnings is not None:
        response.headers["X-Tailrace-Warnings"] = warnings
    guard = g.pop("guard", None)
    if guard is not None:
        # The answer is complete; only its way to the client is still watched.
        guard.writing()
        response.call_on_close(guard.close)
    return response


def _release(_: BaseException | None) -> None:
    """Whatever ended the request (an answer, an error, this process being stopped), nothing of it goes on."""
    guard, stream = g.pop("guard", None), g.pop("stream", None)
    if guard is not None:
        guard.close()
    if stream is not None:
        service().close_stream(stream)
