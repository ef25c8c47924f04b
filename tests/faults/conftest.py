"""Fixtures of the fault tests: those of the pool's, and a whole service."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.service import Service
from tests.workers.pool.conftest import directory, start_pool

__all__ = ["directory", "start_pool", "start_service"]


@pytest.fixture
def start_service(directory: Path) -> Iterator[Callable[..., Service]]:
    """Start gunicorn with the project's configuration and a scripted engine; all of it is gone after the test."""
    services: list[Service] = []

    def start(**settings: object) -> Service:
        services.append(Service(directory, settings))
        return services[-1]

    yield start
    for service in services:
        service.kill_all()
