"""A clean environment for each test: no TAILRACE_ variables, no platform's, no local.toml."""

import os

import pytest

from config import checks


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TAILRACE_") or name in ("PORT", "WEB_CONCURRENCY", "GUNICORN_FD", "LISTEN_PID"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TAILRACE_CONFIG", os.devnull)
    checks._gpus_found.cache_clear()
