"""What a run measured, as it is written to results.json and read back for tables and plots. Seconds and bytes."""

from collections.abc import Callable, Sequence
from statistics import median

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """How some seconds are spread; all 0 when there were none."""

    count: int = 0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    longest: float = 0.0


class Start(msgspec.Struct, frozen=True):
    """From the command to the readiness check, and to the first token of a request sent right then."""

    ready_s: float
    first_token_s: float


class Load(msgspec.Struct, frozen=True):
    """A closed loop of ``clients`` (0: requests at a fixed rate). ``short`` answers had fewer tokens than asked for.

    ``seconds`` run from the first request to the last token. ``cut``: the time limit ended it, and what had come until
    then counts.
    """

    clients: int
    requests: int
    tokens: int
    seconds: float
    short: int
    failed: int
    cut: bool
    first_token: Spread
    gaps: Spread
    client_cpu_s: float
    error: str | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Prompts(msgspec.Struct, frozen=True):
    """Seconds to the first token of long prompts never seen before, and of the same with another last question."""

    prompt_tokens: int
    cold_s: list[float]
    again_s: list[float]
    error: str | None = None


class Disturbance(msgspec.Struct, frozen=True):
    """Token gaps of running streams ``alone``, and ``with_prompts`` while long prompts arrived one after the other."""

    streams: int
    alone: Spread
    with_prompts: Spread
    prompts: int
    prompt_first_token: Spread
    error: str | None = None


class Memory(msgspec.Struct, frozen=True):
    """Memory of all processes of a server."""

    pss_bytes: int
    rss_bytes: int
    processes: int


class Round(msgspec.Struct):
    """One start of a server and all that was measured before it was stopped. None: not measured.

    ``others_cpu`` is the share of the machine's CPU time that neither server nor load generator took.
    """

    number: int
    start: Start | None = None
    settled: bool | None = None
    loads: list[Load] = []
    prompts: Prompts | None = None
    disturbance: Disturbance | None = None
    rate: Load | None = None
    memory_idle: Memory | None = None
    memory_busy: Memory | None = None
    others_cpu: float | None = None
    failure: str | None = None


class ServerResult(msgspec.Struct):
    """A server and its rounds; ``version`` None: it is not installed, and ``how_to_install`` says how it would be."""

    name: str
    title: str
    version: str | None
    how_to_install: str
    command: list[str]
    environment: dict[str, str]
    rounds: list[Round] = []

    def median(self, value: Callable[[Round], float | None]) -> float | None:
        """The median over the rounds in which there is such a value, or None."""
        found = [each for each in map(value, self.rounds) if each is not None]
        return median(found) if found else None

    def tokens_per_s(self, clients: int) -> float | None:
        """Median output tokens per second with so many clients."""
        return self.median(
            lambda round_: next(
                (load.tokens_per_s for load in round_.loads if load.clients == clients and load.tokens), None
            )
        )

    def later_start_s(self) -> float | None:
        """Median time to the first token after a start, without the first one of the run when there are more."""
        starts = [each.start.first_token_s for each in self.rounds if each.start]
        return median(starts[1:] or starts) if starts else None


class Machine(msgspec.Struct, frozen=True):
    """Where it ran. ``cpu_features`` are those that matter for matrix products."""

    cpu: str
    cores: int
    memory_bytes: int
    cpu_features: list[str]
    system: str


class Results(msgspec.Struct):
    """A whole run."""

    date: str
    commit: str
    quick: bool
    machine: Machine
    versions: dict[str, str]
    seconds: float = 0.0
    servers: list[ServerResult] = []

    def server(self, name: str) -> ServerResult | None:
        return next((each for each in self.servers if each.name == name), None)


def spread(seconds: Sequence[float]) -> Spread:
    """Return median, 90th and 99th percentile (nearest rank) and longest."""
    if not seconds:
        return Spread()
    ranked = sorted(seconds)

    def at(percent: int) -> float:
        return ranked[max(0, -(-percent * len(ranked) // 100) - 1)]

    return Spread(len(ranked), at(50), at(90), at(99), ranked[-1])
