"""What the status page shows, as JSON."""

import time
from typing import Any

from app.api.health import problem
from app.metrics import definitions as of
from app.metrics.definitions import Definition
from app.metrics.exposition import Scene
from app.metrics.tally import BUCKET, INFINITY, Numbers
from workers.messages import PoolCounters, PoolStatus, WorkerStatus


def status_body(scene: Scene) -> dict[str, Any]:
    """Return the scene as an object; counters are told as they are, the page looks at how they grow."""
    numbers, status = scene.numbers, scene.status
    limits = {name: value for name, _, value in scene.limits}
    return {
        "time": time.time(),
        "version": scene.version,
        "model": scene.model_name,
        "state": _state(scene),
        "reason": problem(status) or "",
        "http": {
            "workers": int(_one(numbers, of.WORKERS)),
            "open_requests": int(_one(numbers, of.OPEN)),
            "memory_bytes": int(_one(numbers, of.RESIDENT)),
            "hub_lag_s": _one(numbers, of.LAG_NOW),
        },
        "queue": _queue(status, limits),
        "workers": [_worker(worker) for worker in status.workers] if status is not None else [],
        "tokens": _tokens(status),
        "ended": _by_label(numbers, of.SUCCESS),
        "cancelled": _by_label(numbers, of.CANCELLED),
        "refused": _by_label(numbers, of.REFUSED),
        "failed": _by_label(numbers, of.FAILED),
        "faults": _faults(status),
        "histograms": {
            "first_token": _histogram(numbers, of.FIRST_TOKEN),
            "gap": _histogram(numbers, of.GAP),
            "queue": _histogram(numbers, of.QUEUE_TIME),
            "latency": _histogram(numbers, of.LATENCY),
        },
    }


def _state(scene: Scene) -> str:
    if scene.status is None:
        return "down"
    if scene.draining:
        return "draining"
    if scene.ready:
        return "ready"
    return "loading" if any(each.state in ("starting", "loading") for each in scene.status.workers) else "not ready"


def _queue(status: PoolStatus | None, limits: dict[str, float]) -> dict[str, float]:
    return {
        "jobs": status.queued if status else 0,
        "tokens": status.queued_tokens if status else 0,
        "running": status.running if status else 0,
        "kept": status.kept if status else 0,
        "tokens_per_second": status.tokens_per_second if status else 0.0,
        "max_jobs": int(limits["max_queue"]),
        "max_tokens": int(limits["max_queue_tokens"]),
    }


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    stats = worker.stats
    return {
        "index": worker.index,
        "device": worker.device,
        "state": worker.state,
        "progress": worker.progress,
        "stage": worker.stage,
        "restarts": worker.restarts,
        "cause": worker.cause,
        "jobs": worker.jobs,
        "idle_s": worker.idle_s,
        "running": stats.running if stats else 0,
        "waiting": stats.waiting if stats else 0,
        "blocks_used": stats.blocks_used if stats else 0,
        "blocks_total": stats.blocks_total if stats else 0,
        "memory_bytes": stats.memory_bytes if stats else 0,
    }


def _tokens(status: PoolStatus | None) -> dict[str, int]:
    stats = [worker.stats for worker in status.workers if worker.stats is not None] if status else []
    return {
        "prompt": sum(each.prompt_tokens for each in stats),
        "cached": sum(each.cached_tokens for each in stats),
        "generated": sum(each.output_tokens for each in stats),
    }


def _faults(status: PoolStatus | None) -> dict[str, int]:
    counters = status.counters if status is not None else PoolCounters()
    stats = [worker.stats for worker in status.workers if worker.stats is not None] if status else []
    return {
        "worker_deaths": counters.worker_deaths,
        "hangs": counters.hangs,
        "replayed": counters.replayed,
        "quarantined": counters.quarantined,
        "poisoned": counters.poisoned,
        "out_of_memory": sum(each.out_of_memory for each in stats),
        "preemptions": sum(each.preemptions for each in stats),
    }


def _one(numbers: Numbers, definition: Definition) -> float:
    return numbers.get((definition.name,), 0.0)


def _by_label(numbers: Numbers, definition: Definition) -> dict[str, int]:
    return {key[1]: int(number) for key, number in sorted(numbers.items()) if key[0] == definition.name}


def _histogram(numbers: Numbers, definition: Definition) -> dict[str, list[float]]:
    """Return the upper ends of the buckets, and how many are in each; the last one has no end."""
    bounds = [*map(repr, definition.bounds), INFINITY]
    counts = [numbers.get((definition.name, BUCKET, bound), 0.0) for bound in bounds]
    return {"bounds": list(definition.bounds), "counts": counts}
