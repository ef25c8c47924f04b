"""What an HTTP worker counts and measures: names, labels, and the bounds of histograms.

Where a number means what it means in vLLM it has vLLM's name. Times are in seconds.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

PREFIX = "tailrace:"


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric, without prefix and the "_total" of counters.

    ``values``: those of its only label, told from the start: no rate sees the step of a counter from nothing to one.
    ``bounds``: upper ends of a histogram's buckets, without infinity. A gauge is added up over the HTTP workers, or the
    greatest counts (``merge``); it goes with its process, where counters and histograms stay.
    """

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram"] = "counter"
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    merge: Literal["sum", "max"] = "sum"


_WAITS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_GAPS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

FIRST_TOKEN = Definition(
    "time_to_first_token_seconds",
    "Time from the moment at which a request was understood to its first token.",
    "histogram",
    bounds=_WAITS,
)
GAP = Definition(
    "inter_token_latency_seconds",
    "Time between two moments at which tokens of a request came; the pause of a replay is one such gap.",
    "histogram",
    bounds=_GAPS,
)
LATENCY = Definition(
    "e2e_request_latency_seconds", "Time from a request to the end of its answer.", "histogram", bounds=_WAITS
)
QUEUE_TIME = Definition(
    "request_queue_time_seconds",
    "Time from a request to the moment at which a model worker began with it.",
    "histogram",
    bounds=_WAITS,
)
LAG = Definition(
    "hub_lag_seconds",
    "How late a greenlet of an HTTP worker woke: so long nobody else was served there.",
    "histogram",
    bounds=_LAGS,
)
SUCCESS = Definition(
    "request_success",
    "Choices of answers that came to their end.",
    labels=("finished_reason",),
    values=("stop", "length"),
)
EMBEDDED = Definition("embedding_requests", "Embedding and scoring requests that were answered.")
CANCELLED = Definition(
    "requests_cancelled",
    "Requests that ended before their answer was complete, by cause: client_gone, left (the client has gone, but "
    "the request goes on and can be resumed), slow_reader, deadline (the answer is what there was), shutdown.",
    labels=("cause",),
    values=("client_gone", "left", "slow_reader", "deadline", "shutdown"),
)
FAILED = Definition(
    "requests_failed",
    "Requests that failed after a model worker had begun with them, by cause: internal, poison, memory, unavailable.",
    labels=("cause",),
    values=("internal", "poison", "memory", "unavailable"),
)
REFUSED = Definition(
    "requests_refused",
    "Requests that were refused, by cause: key, key_limit, page or name (a foreign web page or host name), invalid, "
    "queue_full, queue_time, poison, memory, unavailable, shutdown.",
    labels=("cause",),
    values=(
        *("key", "key_limit", "page", "name", "invalid", "queue_full", "queue_time", "poison", "memory"),
        *("unavailable", "shutdown"),
    ),
)
CUT_STRINGS = Definition("stop_strings", "Choices that a stop string of the request ended.")
HTTP = Definition(
    "http_requests",
    "HTTP requests, by the template of their route (none: no route, or refused at the door), method and status.",
    labels=("route", "method", "status"),
)
OPEN = Definition("open_requests", "Requests for the model that HTTP workers are answering now.", "gauge")
WORKERS = Definition("http_workers", "HTTP workers that are alive.", "gauge")
RESIDENT = Definition("http_resident_memory_bytes", "Memory of all HTTP workers.", "gauge")
LARGEST = Definition("http_resident_memory_max_bytes", "Memory of the HTTP worker that has most.", "gauge", merge="max")
DESCRIPTORS = Definition("http_open_fds", "File descriptors open in all HTTP workers.", "gauge")
LAG_NOW = Definition(
    "hub_lag_recent_max_seconds", "The greatest hub lag of the last seconds, of all HTTP workers.", "gauge", merge="max"
)

DEFINITIONS = (
    FIRST_TOKEN, GAP, LATENCY, QUEUE_TIME, LAG, SUCCESS, EMBEDDED, CANCELLED, FAILED, REFUSED, CUT_STRINGS, HTTP, OPEN,
    WORKERS, RESIDENT, LARGEST, DESCRIPTORS, LAG_NOW,
)  # fmt: skip

BY_NAME = {definition.name: definition for definition in DEFINITIONS}

# Numbers of another version of this table cannot be added to ours.
EDITION = sha256(repr([(each.name, each.kind, each.labels, each.bounds) for each in DEFINITIONS]).encode()).hexdigest()[
    :12
]
