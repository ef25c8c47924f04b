"""The numbers as metrics: those of the HTTP workers from their tallies, the others from the pool's own word."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.metrics.definitions import DEFINITIONS, PREFIX, Definition
from app.metrics.pool import pool_metrics
from app.metrics.tally import BUCKET, INFINITY, SUM, Numbers
from workers.messages import PoolStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Scene:
    """All that is told at one moment. ``status`` None: the pool does not answer. ``limits``: name, unit, value."""

    numbers: Numbers
    status: PoolStatus | None
    ready: bool
    draining: bool
    model_name: str
    version: str
    limits: Sequence[tuple[str, str, float]]


def exposition(scene: Scene) -> bytes:
    """Return the scene as Prometheus reads it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Everything(scene))
    return generate_latest(registry)


class _Everything(Collector):
    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, also those that are 0: what is missing cannot be watched."""
        yield from _service(self._scene)
        for definition in DEFINITIONS:
            yield _own(definition, self._scene)
        if self._scene.status is not None:
            yield from pool_metrics(self._scene.status, self._scene.model_name)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _service(scene: Scene) -> Iterator[Metric]:
    yield _gauge("up", "Whether the pool of model workers answers.", scene.status is not None)
    yield _gauge("ready", "Whether a request would be answered now.", scene.ready)
    yield _gauge("draining", "Whether the service is about to stop.", scene.draining)
    build = GaugeMetricFamily(
        PREFIX + "build_info", "Versions; the value is always 1.", labels=["version", "python", "model_name"]
    )
    build.add_metric([scene.version, platform.python_version(), scene.model_name], 1)
    yield build
    limits = GaugeMetricFamily(
        PREFIX + "limit",
        "Limits in force, by the name of their setting; 0 may stand for none.",
        labels=["name", "unit"],
    )
    for name, unit, value in scene.limits:
        limits.add_metric([name, unit], value)
    yield limits


def _own(definition: Definition, scene: Scene) -> Metric:
    names, values = ["model_name", *definition.labels], [scene.model_name]
    name, numbers = PREFIX + definition.name, scene.numbers
    if definition.kind == "histogram":
        return _histogram(definition, numbers, names, values)
    family: CounterMetricFamily | GaugeMetricFamily
    if definition.kind == "counter":
        family = CounterMetricFamily(name, definition.help, labels=names)
    else:
        family = GaugeMetricFamily(name, definition.help, labels=names)
    found = {key for key in numbers if key[0] == definition.name and len(key) == 1 + len(definition.labels)}
    if not definition.labels:
        found.add((definition.name,))
    for key in sorted(found | {(definition.name, value) for value in definition.values}):
        family.add_metric([*values, *key[1:]], numbers.get(key, 0.0))
    return family


def _histogram(definition: Definition, numbers: Numbers, names: list[str], values: list[str]) -> Metric:
    buckets = []
    below = 0.0
    for bound in [*map(repr, definition.bounds), INFINITY]:
        below += numbers.get((definition.name, BUCKET, bound), 0.0)
        buckets.append((bound, below))
    family = HistogramMetricFamily(PREFIX + definition.name, definition.help, labels=names)
    family.add_metric(values, buckets, numbers.get((definition.name, SUM), 0.0))
    return family
