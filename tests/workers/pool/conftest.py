"""Fixtures of the pool's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workers.pool.harness import PoolProcess, private_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    """A runtime directory."""
    with private_directory() as path:
        yield path


@pytest.fixture
def start_pool(directory: Path) -> Iterator[Callable[..., PoolProcess]]:
    """Start pools in the runtime directory; they are gone after the test."""
    pools: list[PoolProcess] = []

    def start(*arguments: str, lifeline: bool = False) -> PoolProcess:
        pools.append(PoolProcess(directory, *arguments, lifeline=lifeline))
        return pools[-1]

    yield start
    for pool in pools:
        pool.kill_all()
