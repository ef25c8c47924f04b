"""What the pool says of itself and of its model workers, as metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app.metrics.definitions import PREFIX
from workers.messages import PoolStatus, Stats, WorkerStatus

_STATES = ("starting", "loading", "ready", "hung", "dead", "failed")
_NOTHING_YET = Stats(steps=0, running=0, waiting=0, blocks_used=0, blocks_total=0)

# Of the pool: name, help, value. Counters begin anew with each pool, as Prometheus expects of them.
_GAUGES: tuple[tuple[str, str, Callable[[PoolStatus], float]], ...] = (
    ("num_requests_waiting", "Jobs in the queue.", lambda pool: pool.queued),
    ("num_tokens_waiting", "Prompt and answer tokens of the jobs in the queue.", lambda pool: pool.queued_tokens),
    ("num_requests_kept", "Requests that outlive their clients, to be resumed.", lambda pool: pool.kept),
    ("queue_drain_rate", "Tokens in a second by which the queue drains.", lambda pool: pool.tokens_per_second),
)
_COUNTERS: tuple[tuple[str, str, Callable[[PoolStatus], float]], ...] = (
    ("jobs_admitted", "Jobs that the pool took.", lambda pool: pool.counters.admitted),
    ("replays", "Jobs that were taken up again after a model worker's death.", lambda pool: pool.counters.replayed),
    ("quarantined", "Replays that were tried alone.", lambda pool: pool.counters.quarantined),
    ("poisoned", "Jobs given up as the cause of deaths.", lambda pool: pool.counters.poisoned),
    ("worker_deaths", "Deaths of model workers.", lambda pool: pool.counters.worker_deaths),
    ("worker_hangs", "Those of them that the watchdog caused.", lambda pool: pool.counters.hangs),
)

# Of each model worker; ``engine`` is its number, as vLLM calls it.
_WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerStatus, Stats], float]], ...] = (
    ("num_requests_running", "Jobs that a model worker works on.", lambda worker, stats: worker.jobs),
    ("num_sequences_running", "Sequences that take part in each step.", lambda worker, stats: stats.running),
    ("num_sequences_waiting", "Sequences that wait for room.", lambda worker, stats: stats.waiting),
    (
        "kv_cache_usage_perc",
        "Used part of the KV cache, 0 to 1.",
        lambda worker, stats: stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
    ),
    ("kv_cache_blocks", "Blocks of the KV cache.", lambda worker, stats: stats.blocks_total),
    (
        "worker_memory_bytes",
        "Memory of a model worker: resident on a CPU, allocated on a GPU.",
        lambda worker, stats: stats.memory_bytes,
    ),
    ("worker_loading_ratio", "How far loading has come, 0 to 1.", lambda worker, stats: worker.progress),
    ("worker_idle_seconds", "Time since the last progress.", lambda worker, stats: worker.idle_s),
)
_WORKER_COUNTERS: tuple[tuple[str, str, Callable[[WorkerStatus, Stats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens read.", lambda worker, stats: stats.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda worker, stats: stats.output_tokens),
    (
        "prefix_cache_queries",
        "Prompt tokens looked for in the prefix cache.",
        lambda worker, stats: stats.prompt_tokens,
    ),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda worker, stats: stats.cached_tokens),
    ("num_preemptions", "Sequences that gave way for want of cache.", lambda worker, stats: stats.preemptions),
    ("out_of_memory", "Steps that the device had too little memory for.", lambda worker, stats: stats.out_of_memory),
    ("engine_steps", "Forward passes.", lambda worker, stats: stats.steps),
    ("worker_restarts", "Times that a model worker was started again.", lambda worker, stats: worker.restarts),
)


def pool_metrics(status: PoolStatus, model_name: str) -> Iterator[Metric]:
    """Yield the metrics of the pool and of its model workers."""
    for name, text, value in _GAUGES:
        yield _gauge(name, text, {(): value(status)}, model_name)
    for name, text, value in _COUNTERS:
        yield _counter(name, text, {(): value(status)}, model_name)
    counters = status.counters
    yield _counter(
        "jobs_ended",
        "Jobs that ended, by outcome.",
        {("finished",): counters.finished, ("failed",): counters.failed, ("cancelled",): counters.cancelled},
        model_name,
        ["outcome"],
    )
    yield _counter(
        "pool_refusals",
        "Jobs that the pool did not take or start: the queue was full, their time in it was over, or they are like one "
        "that ended model workers.",
        {
            ("queue_full",): counters.refused_full,
            ("queue_time",): counters.queue_timeouts,
            ("poison",): counters.refused_poison,
        },
        model_name,
        ["cause"],
    )
    yield from _worker_metrics(status.workers, model_name)


def _worker_metrics(workers: Sequence[WorkerStatus], model_name: str) -> Iterator[Metric]:
    for name, text, value in _WORKER_GAUGES:
        yield _gauge(name, text, _of_each(workers, value), model_name, ["engine"])
    for name, text, value in _WORKER_COUNTERS:
        yield _counter(name, text, _of_each(workers, value), model_name, ["engine"])
    states: dict[tuple[str, ...], float] = {
        (str(worker.index), state): float(worker.state == state) for worker in workers for state in _STATES
    }
    yield _gauge("worker_state", "1 for the state that a model worker is in.", states, model_name, ["engine", "state"])


def _of_each(
    workers: Sequence[WorkerStatus], value: Callable[[WorkerStatus, Stats], float]
) -> dict[tuple[str, ...], float]:
    return {(str(worker.index),): value(worker, worker.stats or _NOTHING_YET) for worker in workers}


def _gauge(
    name: str, text: str, values: Mapping[tuple[str, ...], float], model_name: str, labels: Sequence[str] = ()
) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", *labels])
    for own, value in values.items():
        family.add_metric([model_name, *own], value)
    return family


def _counter(
    name: str, text: str, values: Mapping[tuple[str, ...], float], model_name: str, labels: Sequence[str] = ()
) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])
    for own, value in values.items():
        family.add_metric([model_name, *own], value)
    return family
