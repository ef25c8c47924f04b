"""/metrics of the real service: two HTTP workers count as one, whatever happens to them."""

import signal
from collections.abc import Iterator
from contextlib import suppress

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.beside import Beside
from tests.e2e.server import Server, wait_until

CHAT = "/v1/chat/completions"
ASK = {"messages": "Count to three.", "max_tokens": 4, "temperature": 0, "ignore_eos": True}

Samples = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    server = Server("--dtype", "float32", "--graceful-timeout-s", "20")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def scrape(server: Server) -> Samples:
    """Name and labels' values, but that of model_name, to value; asked on a connection of its own."""
    answer = httpx.get(f"{server.url}/metrics", timeout=30)
    assert answer.status_code == 200
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[(sample.name.removeprefix("tailrace:"), *labels)] = sample.value
    return found


def ask(server: Server, times: int) -> None:
    """Each on a connection of its own, so that both HTTP workers get some."""
    for _ in range(times):
        assert httpx.post(server.url + CHAT, json=ASK, timeout=60).status_code == 200


def answered(server: Server) -> float:
    return scrape(server).get(("request_success_total", "length"), 0.0)


def http_workers(server: Server, pool: int) -> set[int]:
    """Their process ids, asked of nobody: a kept connection may be one to a process that was killed."""
    return {child.pid for child in psutil.Process(server.process.pid).children()} - {pool}


class Watch(Beside):
    """Scrapes all the time; ``falls`` are counters that were less than before."""

    period_s = 0.05

    def __init__(self, server: Server) -> None:
        self._server = server
        self._last: Samples = {}
        self.scrapes = 0
        self.falls: list[tuple[tuple[str, ...], float, float]] = []

    def look(self) -> None:
        """Scrape once."""
        # A connection to a worker that is being killed says nothing of the numbers.
        with suppress(httpx.TransportError):
            found = scrape(self._server)
            for key, value in found.items():
                if key[0].endswith(("_total", "_bucket", "_count", "_sum")) and value < self._last.get(key, 0.0):
                    self.falls.append((key, self._last[key], value))
            self._last |= found
            self.scrapes += 1


def test_nothing_is_lost_or_counted_twice_when_http_workers_are_killed_and_replaced(own_server: Server):
    begun = answered(own_server)
    (pool,) = {each.pid for each in psutil.Process(own_server.process.pid).children()} - own_server.http_workers()
    with Watch(own_server) as watch:
        ask(own_server, 6)
        assert answered(own_server) == begun + 6
        before = http_workers(own_server, pool)
        victim = min(before)
        psutil.Process(victim).kill()
        wait_until(lambda: len(http_workers(own_server, pool) - before) == 1, "another HTTP worker", 30)
        wait_until(lambda: scrape(own_server)[("http_workers",)] == 2, "two that count", 30)
        assert answered(own_server) == begun + 6
        ask(own_server, 3)
        assert answered(own_server) == begun + 9
        before = http_workers(own_server, pool)
        own_server.signal(signal.SIGHUP)
        wait_until(lambda: not http_workers(own_server, pool) & before, "new HTTP workers", 60)
        wait_until(lambda: scrape(own_server)[("http_workers",)] == 2, "two that count", 30)
        ask(own_server, 3)
        assert answered(own_server) == begun + 12
        wait_until(lambda: watch.scrapes > 5, "scrapes", 30)
    assert watch.falls == []
    found = scrape(own_server)
    assert found[("time_to_first_token_seconds_count",)] == found[("e2e_request_latency_seconds_count",)] == begun + 12
    # Four tokens a request: three gaps, but where two came at once.
    assert begun + 12 <= found[("inter_token_latency_seconds_count",)] <= 3 * (begun + 12)


def test_a_client_that_leaves_and_one_whose_time_is_over_are_told_apart(own_server: Server):
    before = scrape(own_server)

    def cancelled(cause: str) -> float:
        key = ("requests_cancelled_total", cause)
        return scrape(own_server)[key] - before[key]

    endless = {**ASK, "max_tokens": 1500, "stream": True}
    with httpx.stream("POST", own_server.url + CHAT, json=endless, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: scrape(own_server)[("open_requests",)] >= 1, "an open request", 30)
    wait_until(lambda: cancelled("client_gone") == 1, "the cancel", 30)
    short = {**ASK, "max_tokens": 1500, "timeout": 4.0}
    assert httpx.post(own_server.url + CHAT, json=short, timeout=60).status_code == 200
    assert cancelled("deadline") == 1
    assert cancelled("client_gone") == 1


def test_tokens_and_caches_of_the_engine_are_told(own_server: Server):
    before = scrape(own_server)
    ask(own_server, 4)

    def grown(name: str) -> float:
        return scrape(own_server)[(name, "0")] - before[(name, "0")]

    wait_until(lambda: grown("generation_tokens_total") >= 16, "the engine's own word of its tokens", 30)
    assert grown("prompt_tokens_total") > 0
    assert grown("engine_steps_total") >= 4
    found = scrape(own_server)
    assert found[("kv_cache_blocks", "0")] > 0
    assert found[("worker_memory_bytes", "0")] > 50e6
    assert found[("http_resident_memory_bytes",)] > 50e6
    assert found[("http_open_fds",)] > 10
    assert found[("hub_lag_seconds_count",)] > 0


def test_the_death_of_a_model_worker_is_told_with_what_followed(own_server: Server):
    endless = {**ASK, "max_tokens": 60, "stream": True}
    with httpx.stream("POST", own_server.url + CHAT, json=endless, timeout=120) as response:
        lines = response.iter_lines()
        wait_until(lambda: "content" in next(lines), "tokens", 60)
        psutil.Process(own_server.worker()["pid"]).kill()
        wait_until(lambda: scrape(own_server)[("ready",)] == 0, "the news of it", 30)
        assert scrape(own_server)[("up",)] == 1
        assert "[DONE]" in list(lines)[-2]
    found = scrape(own_server)
    assert found[("worker_deaths_total",)] == 1
    assert found[("replays_total",)] == 1
    assert found[("worker_restarts_total", "0")] == 1
    assert found[("worker_state", "0", "ready")] == 1
