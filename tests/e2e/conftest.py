"""One server and one reference model for all tests here; tests that stop or disturb a server start their own."""

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.reference import Reference
from tests.e2e.server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The embedded model in float32, so that answers can be compared to the token."""
    server = Server("--dtype", "float32")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
