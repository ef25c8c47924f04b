"""Two applications that share a store, as two HTTP workers do, and openai's client for the first one."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from app import Application
from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, tokens
from tests.app.tiny import IM_END, ids_of

REPLY = "Paris is the capital."


def client_of(app: Application) -> openai.OpenAI:
    """openai's client, connected to an application of this process."""
    transport = httpx2.WSGITransport(app=app, raise_app_exceptions=True)
    http = httpx2.Client(transport=transport, base_url="http://localhost")
    return openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture
def app(runtime: Path, pool: ScriptedPool) -> Iterator[Application]:
    with application(runtime) as made:
        assert isinstance(made, Application)
        yield made
        made.close()


@pytest.fixture
def answering(pool: ScriptedPool) -> ScriptedPool:
    """A pool that always says `REPLY`."""
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    return pool


@pytest.fixture
def other(runtime: Path, pool: ScriptedPool) -> Iterator[Application]:
    """Another HTTP worker of the same service."""
    with application(runtime) as made:
        assert isinstance(made, Application)
        yield made
        made.close()


@pytest.fixture
def http(app: Application):
    """Flask's client of the first application."""
    return app.test_client()
