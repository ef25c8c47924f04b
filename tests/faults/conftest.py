"""Fixtures of the fault tests: those of the pool's, a whole service, and the table of what was done."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.service import Service
from tests.workers.pool.conftest import directory, start_pool

__all__ = ["directory", "row", "start_pool", "start_service"]

_rows: list[table.Row] = []


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[table.Row]:
    """The battery's row of this test, named in its function's name (``test_f1_...``); checked at its end."""
    found = re.match(r"test_([fl]\d+)_", request.function.__name__)
    assert found, "the name of a row's test begins with the row: test_f1_..."
    made = table.Row(found[1].upper())
    yield made
    made.check()
    _rows.append(made)


def pytest_sessionfinish() -> None:
    """Write the table where ``FAULTS_TABLE`` says, if it does (``make faults``)."""
    path = os.environ.get("FAULTS_TABLE")
    if path and _rows:
        moment = f"{datetime.now(UTC):%Y-%m-%d}"
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
        table.write(_rows, Path(path), f"Written by `make faults` on {moment}; {machine}.")


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
