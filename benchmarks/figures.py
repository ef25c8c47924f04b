"""Single figures of a round, None when not measured: what medians, targets, tables and plots are made of."""

from collections.abc import Callable
from statistics import median

from benchmarks.results import Round, Spread

Figure = Callable[[Round], float | None]


def cold_s(round_: Round) -> float | None:
    """Seconds to the first token of a long prompt never seen before."""
    return median(round_.prompts.cold_s) if round_.prompts and round_.prompts.cold_s else None


def again_s(round_: Round) -> float | None:
    """Seconds to the first token of a long prompt whose prefix was seen before."""
    return median(round_.prompts.again_s) if round_.prompts and round_.prompts.again_s else None


def normal_gap(round_: Round) -> float | None:
    """Median seconds between two tokens of a stream, four streams running and nothing else."""
    return round_.disturbance.alone.p50 if round_.disturbance and round_.disturbance.alone.count else None


def disturbed_gap(percentile: Callable[[Spread], float]) -> Figure:
    """Seconds between two tokens of those streams while long prompts arrive."""

    def figure(round_: Round) -> float | None:
        return (
            percentile(round_.disturbance.with_prompts) if round_.disturbance and round_.disturbance.prompts else None
        )

    return figure


longest_gap = disturbed_gap(lambda spread: spread.longest)


def rate_first_token(percentile: Callable[[Spread], float]) -> Figure:
    """Seconds to the first token of requests that come at a fixed rate."""
    return lambda round_: percentile(round_.rate.first_token) if round_.rate and round_.rate.tokens else None


def rate_gap(percentile: Callable[[Spread], float]) -> Figure:
    """Seconds between two tokens of requests that come at a fixed rate."""
    return lambda round_: percentile(round_.rate.gaps) if round_.rate and round_.rate.tokens else None


def idle_pss(round_: Round) -> float | None:
    """Bytes of all processes after the load, shared pages counted once."""
    return round_.memory_idle.pss_bytes if round_.memory_idle else None


def busy_pss(round_: Round) -> float | None:
    """Bytes of all processes at 32 clients, shared pages counted once."""
    return round_.memory_busy.pss_bytes if round_.memory_busy else None


def busy_rss(round_: Round) -> float | None:
    """Bytes of all processes at 32 clients, shared pages counted for each."""
    return round_.memory_busy.rss_bytes if round_.memory_busy else None
