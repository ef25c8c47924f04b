"""The speed that Tailrace is to reach, each target held against one run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.figures import Figure, again_s, busy_pss, cold_s, longest_gap, normal_gap
from benchmarks.results import Results, ServerResult

VLLM = ("vllm", "vllm-all-cores")
MEMORY_LIMIT = 1.5e9
START_LIMIT_S = 15.0
AGAIN_LIMIT_S = 0.060
GAP_RATIO = 3.0


@dataclass(frozen=True)
class Verdict:
    """One line: ``met`` is None when it, or what it is held against, was not measured."""

    what: str
    target: str
    measured: str
    beside: str
    met: bool | None


def verdicts(results: Results) -> Iterator[Verdict]:
    """Yield all targets that this suite can judge."""
    for clients, factor, names in (
        (1, 1.15, ("llama-server",)),
        (4, 1.5, ("llama-server", *VLLM)),
        (8, 1.5, ("llama-server", *VLLM)),
        (16, 1.4, VLLM),
        (32, 1.4, VLLM),
    ):
        yield _throughput(results, clients, factor, names)
    yield _cold_prompt(results)
    ours = results.server("tailrace")
    yield _limit("the same prefix again, first token", ours, again_s, AGAIN_LIMIT_S, _milliseconds)
    yield from _gaps(results)
    start = ours.later_start_s() if ours else None
    yield Verdict(
        "start to first token, second start", f"<= {START_LIMIT_S:.0f} s", _shown(start, _seconds),
        _others(results, ServerResult.later_start_s, _seconds), None if start is None else start <= START_LIMIT_S,
    )  # fmt: skip
    yield _limit("resident memory, all processes (PSS, 32 clients)", ours, busy_pss, MEMORY_LIMIT, _gigabytes, results)


def _throughput(results: Results, clients: int, factor: float, names: tuple[str, ...]) -> Verdict:
    ours = _of(results, "tailrace", lambda server: server.tokens_per_s(clients))
    peers = {name: value for name in names if (value := _of(results, name, lambda s: s.tokens_per_s(clients)))}
    best = max(peers, key=lambda name: peers[name], default=None)
    against = " or ".join(dict.fromkeys("vLLM" if name in VLLM else name for name in names))
    return Verdict(
        f"output tokens/s, {clients} client{'s' if clients > 1 else ''}",
        f">= {factor:g} x {against}",
        _shown(ours, _tokens) + (f" = {ours / peers[best]:.2f} x" if ours and best else ""),
        f"{_title(results, best)} {_tokens(peers[best])}" if best else "-",
        ours >= factor * peers[best] if ours and best else None,
    )


def _cold_prompt(results: Results) -> Verdict:
    ours = _of(results, "tailrace", lambda server: server.median(cold_s))
    peers = {name: value for name in VLLM if (value := _of(results, name, lambda server: server.median(cold_s)))}
    best = min(peers, key=lambda name: peers[name], default=None)
    return Verdict(
        "cold 1,600-token prompt, first token",
        "<= 0.5 x vLLM",
        _shown(ours, _seconds) + (f" = {ours / peers[best]:.2f} x" if ours and best else ""),
        f"{_title(results, best)} {_seconds(peers[best])}" if best else "-",
        ours <= 0.5 * peers[best] if ours and best else None,
    )


def _gaps(results: Results) -> Iterator[Verdict]:
    ours = results.server("tailrace")
    longest = ours.median(longest_gap) if ours else None
    normal = ours.median(normal_gap) if ours else None
    what = "longest token gap of 4 streams while long prompts arrive"
    yield Verdict(
        what,
        f"<= {GAP_RATIO:g} x the normal gap",
        _shown(longest, _milliseconds) + (f" = {longest / normal:.1f} x" if longest and normal else ""),
        f"normal gap {_milliseconds(normal)}" if normal else "-",
        longest <= GAP_RATIO * normal if longest and normal else None,
    )
    peers = {name: value for name in VLLM if (value := _of(results, name, lambda server: server.median(longest_gap)))}
    best = min(peers, key=lambda name: peers[name], default=None)
    yield Verdict(
        what,
        "< vLLM",
        _shown(longest, _milliseconds),
        f"{_title(results, best)} {_milliseconds(peers[best])}" if best else "-",
        longest < peers[best] if longest and best else None,
    )


def _limit(
    what: str,
    ours: ServerResult | None,
    value: Figure,
    limit: float,
    shown: Callable[[float], str],
    results: Results | None = None,
) -> Verdict:
    measured = ours.median(value) if ours else None
    beside = _others(results, lambda server: server.median(value), shown) if results else "-"
    return Verdict(
        what, f"<= {shown(limit)}", _shown(measured, shown), beside, None if measured is None else measured <= limit
    )


def _of(results: Results, name: str, value: Callable[[ServerResult], float | None]) -> float | None:
    server = results.server(name)
    return value(server) if server else None


def _others(results: Results, value: Callable[[ServerResult], float | None], shown: Callable[[float], str]) -> str:
    found = [(each.title, value(each)) for each in results.servers if each.name in ("llama-server", "vllm")]
    return "; ".join(f"{title} {shown(number)}" for title, number in found if number is not None) or "-"


def _title(results: Results, name: str | None) -> str:
    server = results.server(name) if name else None
    return server.title if server else ""


def _shown(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _tokens(value: float) -> str:
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _milliseconds(value: float) -> str:
    return f"{value * 1000:.0f} ms"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
