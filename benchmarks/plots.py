"""Plots of a run: throughput over concurrency, time to first token, token gaps."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import figures
from benchmarks.results import Results, ServerResult, Spread
from benchmarks.servers import CONCURRENCY

_COLORS = {
    "tailrace": "#d1495b", "llama-server": "#2e4057", "vllm": "#66a182", "vllm-all-cores": "#1b6b4f",
    "transformers": "#b8b8b8", "transformers-batching": "#8d96a3",
}  # fmt: skip
_PERCENTILES: tuple[tuple[str, Callable[[Spread], float]], ...] = (
    ("median", lambda spread: spread.p50),
    ("90 %", lambda spread: spread.p90),
    ("99 %", lambda spread: spread.p99),
    ("longest", lambda spread: spread.longest),
)


def write(results: Results, out: Path) -> list[tuple[Path, str]]:
    """Write a PNG for each kind of figure that was measured. Returns the files with their captions."""
    servers = [server for server in results.servers if server.rounds]
    written = []
    for name, caption, draw in (
        ("throughput", "Output tokens per second over concurrent clients", _throughput),
        ("first-token", "Time to first token", _first_token),
        ("token-gaps", "Token gaps of four streams while long prompts arrive", _token_gaps),
    ):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        if draw(axes, servers):
            axes.set_title(f"{caption}\n", fontsize=12)
            machine = f"{results.machine.cpu}, {results.machine.cores} cores, {results.date}, commit {results.commit}"
            axes.text(0.5, 1.02, machine, transform=axes.transAxes, ha="center", fontsize=7, color="#777777")
            file = out / f"{name}.png"
            figure.savefig(file, dpi=120, metadata={"Software": None})
            written.append((file, caption))
        pyplot.close(figure)
    return written


def _throughput(axes: Any, servers: list[ServerResult]) -> bool:
    drawn = False
    for server in servers:
        points = [(clients, value) for clients in CONCURRENCY if (value := server.tokens_per_s(clients)) is not None]
        if points:
            thick = 2.6 if server.name == "tailrace" else 1.5
            axes.plot(*zip(*points, strict=True), marker="o", label=server.title, color=_color(server), linewidth=thick)
            drawn = True
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONCURRENCY, [str(clients) for clients in CONCURRENCY])
    axes.set_xlabel("concurrent clients")
    axes.set_ylabel("output tokens/s, all clients")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(fontsize=8)
    return drawn


def _first_token(axes: Any, servers: list[ServerResult]) -> bool:
    groups = [
        ("cold 1,600-token\nprompt", figures.cold_s),
        ("the same\nprefix again", figures.again_s),
        ("short prompts,\nfixed rate, median", figures.rate_first_token(lambda spread: spread.p50)),
        ("short prompts,\nfixed rate, 90 %", figures.rate_first_token(lambda spread: spread.p90)),
    ]
    return _bars(axes, servers, groups)


def _token_gaps(axes: Any, servers: list[ServerResult]) -> bool:
    disturbed = [(name, figures.disturbed_gap(percentile)) for name, percentile in _PERCENTILES]
    return _bars(axes, servers, [("alone,\nmedian", figures.normal_gap), *disturbed])


def _bars(axes: Any, servers: list[ServerResult], groups: Sequence[tuple[str, figures.Figure]]) -> bool:
    """Draw a group of bars for each value, in milliseconds on a logarithmic axis. Returns False if there are none."""
    shown = [server for server in servers if any(server.median(value) for _, value in groups)]
    width = 0.8 / max(1, len(shown))
    for place, server in enumerate(shown):
        heights = [(server.median(value) or 0.0) * 1000 for _, value in groups]
        at = [group + place * width - 0.4 + width / 2 for group in range(len(groups))]
        bars = axes.bar(at, heights, width, label=server.title, color=_color(server))
        axes.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=6, padding=1)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set_yscale("log")
    if heights := [bar.get_height() for bar in axes.patches if bar.get_height() > 0]:
        # A whole decade below the lowest bar, so that it is one; above the highest, room for the legend.
        axes.set_ylim(10 ** math.floor(math.log10(min(heights) / 2)), max(heights) * 8)
    axes.set_ylabel("milliseconds")
    axes.grid(axis="y", alpha=0.3)
    if shown:
        axes.legend(fontsize=8, ncols=2)
    return bool(shown)


def _color(server: ServerResult) -> str:
    return _COLORS.get(server.name, "#444444")
