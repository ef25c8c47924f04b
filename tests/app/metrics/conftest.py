"""Debian's promtool, Prometheus's own judge of names and rules."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.debian import PROMTOOL

Promtool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def promtool() -> Promtool:
    path = PROMTOOL.path()
    if path is None:
        assert PROMTOOL.may_be_missing, "apt-get has not brought promtool"
        pytest.skip("no promtool: `make test` fetches it from Debian's package where apt-get can")

    def run(*words: str | Path, given: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run([path, *map(str, words)], input=given, capture_output=True, text=True, timeout=60)

    return run
