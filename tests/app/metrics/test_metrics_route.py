"""GET /metrics, as Prometheus and its linter see it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from tests.app.conftest import application
from tests.app.metrics.conftest import Promtool
from tests.app.scripted_pool import ScriptedPool, eventually, tokens
from workers.messages import PoolCounters, Stats, WorkerStatus

# Those whose meaning is the same as in vLLM have its names, which its dashboards know.
OF_VLLM = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_success_total",
}


@pytest.fixture
def client(runtime: Path, pool: ScriptedPool) -> Iterator[FlaskClient]:
    pool.reply = tokens([65, 66], reason="length")
    stats = Stats(
        steps=9, running=2, waiting=1, blocks_used=3, blocks_total=4, memory_bytes=5, prompt_tokens=60,
        cached_tokens=40, output_tokens=70, preemptions=8, out_of_memory=9,
    )  # fmt: skip
    workers = [
        WorkerStatus(index=0, device="cpu", pid=1, state="ready", progress=1.0, jobs=2, restarts=1, stats=stats),
        WorkerStatus(index=1, device="cuda:1", pid=None, state="dead", restarts=3, cause="signal 9"),
    ]
    counters = PoolCounters(
        admitted=10, finished=6, failed=2, cancelled=1, replayed=4, quarantined=3, poisoned=1, refused_poison=5,
        refused_full=7, queue_timeouts=8, worker_deaths=11, hangs=2,
    )  # fmt: skip
    pool.status = type(pool.status)(
        ready=True, draining=False, queued=12, running=2, card_path=pool.status.card_path, workers=workers,
        queued_tokens=1300, kept=14, tokens_per_second=15.5, counters=counters,
    )  # fmt: skip
    with application(runtime) as app:
        eventually(lambda: app.extensions["tailrace"].models.current())
        yield app.test_client()


def samples(client: FlaskClient) -> dict[tuple[str, ...], float]:
    """Name and labels' values, without that of model_name, to value."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("tailrace:"), *(sample.labels[name] for name in sorted(sample.labels) if name != "model_name")): sample.value  # noqa: E501
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }  # fmt: skip


def test_everything_that_the_pool_says_is_told(client: FlaskClient):
    found = samples(client)
    expected = {
        ("up",): 1,
        ("ready",): 1,
        ("draining",): 0,
        ("num_requests_waiting",): 12,
        ("num_tokens_waiting",): 1300,
        ("num_requests_kept",): 14,
        ("queue_drain_rate",): 15.5,
        ("num_requests_running", "0"): 2,
        ("num_requests_running", "1"): 0,
        ("num_sequences_running", "0"): 2,
        ("num_sequences_waiting", "0"): 1,
        ("kv_cache_usage_perc", "0"): 0.75,
        ("kv_cache_blocks", "0"): 4,
        ("worker_memory_bytes", "0"): 5,
        ("prompt_tokens_total", "0"): 60,
        ("generation_tokens_total", "0"): 70,
        ("prefix_cache_queries_total", "0"): 60,
        ("prefix_cache_hits_total", "0"): 40,
        ("num_preemptions_total", "0"): 8,
        ("out_of_memory_total", "0"): 9,
        ("engine_steps_total", "0"): 9,
        ("worker_restarts_total", "1"): 3,
        ("worker_state", "0", "ready"): 1,
        ("worker_state", "1", "ready"): 0,
        ("worker_state", "1", "dead"): 1,
        ("jobs_admitted_total",): 10,
        ("jobs_ended_total", "finished"): 6,
        ("jobs_ended_total", "failed"): 2,
        ("jobs_ended_total", "cancelled"): 1,
        ("replays_total",): 4,
        ("quarantined_total",): 3,
        ("poisoned_total",): 1,
        ("pool_refusals_total", "poison"): 5,
        ("pool_refusals_total", "queue_full"): 7,
        ("pool_refusals_total", "queue_time"): 8,
        ("worker_deaths_total",): 11,
        ("worker_hangs_total",): 2,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_names_are_those_of_vllm_where_the_meaning_is_the_same(client: FlaskClient):
    names = {key[0] for key in samples(client)}
    assert {name for name in OF_VLLM if name not in names and f"{name}_bucket" not in names} == set()


def test_limits_in_force_are_told(runtime: Path, pool: ScriptedPool):
    with application(runtime, max_queue=17, queue_timeout_s=2.5) as app:
        found = samples(app.test_client())
    assert found[("limit", "max_queue", "requests")] == 17
    assert found[("limit", "queue_timeout_s", "seconds")] == 2.5


def test_without_a_pool_up_is_0_and_the_rest_is_told(client: FlaskClient, pool: ScriptedPool):
    assert client.post("/v1/chat/completions", json={"messages": "Hello"}).status_code == 200
    pool.stop()
    eventually(lambda: client.application.extensions["tailrace"].pool.status is None)
    found = samples(client)
    assert (found[("up",)], found[("ready",)]) == (0, 0)
    assert found[("request_success_total", "length")] == 1
    assert found[("limit", "max_queue", "requests")] > 0
    assert not [key for key in found if key[0] == "replays_total"]


def test_a_pool_that_does_not_answer_holds_a_scrape_up_for_a_second_at_most(client: FlaskClient, pool: ScriptedPool):
    pool.answers_queries = False
    found = samples(client)
    assert found[("up",)] == 0
    assert found[("http_workers",)] == 1


def test_promtool_has_nothing_to_say_but_of_the_prefix(client: FlaskClient, promtool: Promtool):
    assert client.post("/v1/chat/completions", json={"messages": "Hello"}).status_code == 200
    text = client.get("/metrics").text
    said = promtool("check", "metrics", given=text).stderr.splitlines()
    # The prefix is vLLM's way; Prometheus would have colons in recording rules only.
    assert said
    assert [line for line in said if not line.endswith("metric names should not contain ':'")] == []
    clean = promtool("check", "metrics", given=text.replace("tailrace:", "tailrace_"))
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "", "")


def test_promtool_would_have_something_to_say(promtool: Promtool):
    assert promtool("check", "metrics", given="# TYPE a_total gauge\na_total 1\n").returncode != 0
