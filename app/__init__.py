"""The HTTP side of Tailrace: a Flask application that turns text into tokens, asks the pool, and tokens into text.

It never imports torch or transformers; the model lives in other processes (``workers/``).
"""

import re

from flask import Flask, Response, g, request

from app.api import chat, completions, embeddings, health, models
from app.api.errors import register_error_handlers
from app.api.service import Service, new_id, service, warnings_header
from config import settings as configuration

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Application(Flask):
    """A Flask application that can be told to come to an end."""

    def end_streams(self) -> None:
        """Take no more requests and end those that are open with an error that their clients can see; never blocks.

        For the HTTP worker, to be called shortly before it stops by force.
        """
        owner: Service = self.extensions["tailrace"]
        owner.drain(0)


def create_app(settings: configuration.Settings | None = None) -> Application:
    """Return the WSGI application; without ``settings`` they are read from the environment and the configuration file.

    The line to the pool is opened at once and kept up. Raises `config.settings.ConfigError` for bad settings.
    """
    app = Application(__name__, static_folder=None)
    # "//v1/models" is no other spelling of a URL; it is 404 as JSON, not a redirect.
    app.url_map.merge_slashes = False
    owner = Service(settings or configuration.load())
    app.extensions["tailrace"] = owner
    for blueprint in (chat, completions, embeddings, models, health):
        app.register_blueprint(blueprint.blueprint)
    register_error_handlers(app)
    app.before_request(_name_request)
    app.after_request(_finish_response)
    app.teardown_request(_release)
    owner.pool.start()
    return app


def _name_request() -> None:
    asked = request.headers.get("X-Request-Id", "")
    g.request_id = asked if _REQUEST_ID.fullmatch(asked) else new_id("req_")


def _finish_response(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.request_id
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
