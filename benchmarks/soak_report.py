"""The curves of a soak as a PNG, and its figures as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.machine import commit, machine

if TYPE_CHECKING:
    from benchmarks.soak import Soak

_COLORS = {"arbiter": "#8d96a3", "HTTP workers": "#2e4057", "pool": "#66a182", "model worker": "#d1495b"}
_MEGABYTE = 2**20


def write(soak: Soak, out: Path) -> None:
    """Write ``soak.png`` and ``soak.md``."""
    _draw(soak, out / "soak.png")
    (out / "soak.md").write_text("\n".join(_lines(soak)) + "\n", encoding="utf-8")


def _draw(soak: Soak, path: Path) -> None:
    figure, panels = pyplot.subplots(4, 1, figsize=(9, 10), sharex=True, layout="constrained")
    for role, color in _COLORS.items():
        series = soak.series.get(role)
        if series is None:
            continue
        minutes = [at / 60 for at in series.at]
        memory = [value / _MEGABYTE for value in series.own]
        # The model worker's own scale: it is ten times the others.
        panels[0 if role == "model worker" else 1].plot(minutes, memory, label=role, color=color)
        panels[2].plot(minutes, series.files, label=role, color=color)
        panels[3].plot(minutes, series.threads, label=role, color=color)
    names = ("private memory, MB", "private memory, MB", "open files", "threads")
    for panel, name in zip(panels, names, strict=True):
        panel.set_ylabel(name)
        panel.set_ylim(0, panel.get_ylim()[1] * 1.2)
        panel.grid(alpha=0.3)
        panel.axvspan(soak.judged[0] / 60, soak.judged[1] / 60, color="#66a182", alpha=0.08)
        for kill in soak.kills:
            panel.axvline(kill / 60, color="#d1495b", linestyle=":", linewidth=1)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, loc="upper right", ncols=4)
    panels[-1].set_xlabel("minutes; dotted: the model worker is killed, shaded: where growth is judged")
    told = machine()
    requests = sum(soak.tally.outcomes.values())
    figure.suptitle(
        f"{soak.minutes:g} minutes of soak: {requests} requests of {soak.clients} clients, {len(soak.kills)} kills\n"
        f"{told.cpu}, {told.cores} cores, {soak.date}, commit {commit()}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _lines(soak: Soak) -> list[str]:
    from benchmarks.soak import slope

    told = machine()
    first, last = soak.judged
    lines = [
        f"# Soak of {soak.minutes:g} minutes",
        "",
        f"Written by `make soak` on {soak.date}; commit {commit()}; {told.cpu}, {told.cores} cores, {told.system}.",
        f"{soak.clients} clients, {sum(soak.tally.outcomes.values())} requests, the model worker killed "
        f"{len(soak.kills)} times (SIGKILL). Slopes are those of minutes {first / 60:.0f} to {last / 60:.0f}.",
        "",
        "![memory, open files and threads](soak.png)",
        "",
        "| process | memory at the beginning | at the end | slope | open files | slope | threads |",
        "|---|---|---|---|---|---|---|",
    ]
    for role in _COLORS:
        series = soak.series.get(role)
        if series is None:
            continue
        chosen = [place for place, at in enumerate(series.at) if first <= at <= last]
        if not chosen:
            continue
        at = [series.at[place] for place in chosen]
        own = [series.own[place] / _MEGABYTE for place in chosen]
        files = [series.files[place] for place in chosen]
        threads = [series.threads[place] for place in chosen]
        lines.append(
            f"| {role} | {own[0]:.1f} MB | {own[-1]:.1f} MB | {slope(at, own) * 3600:+.2f} MB/h | {_span(files)} "
            f"| {slope(at, files) * 3600:+.1f}/h | {_span(threads)} |"
        )
    lines += ["", "| client | " + " | ".join(_outcomes(soak)) + " |", "|---|" + "---|" * len(_outcomes(soak))]
    kinds = sorted({kind for kind, _ in soak.tally.outcomes})
    for kind in kinds:
        counts = [str(soak.tally.outcomes.get((kind, outcome), 0) or "") for outcome in _outcomes(soak)]
        lines.append(f"| {kind} | " + " | ".join(counts) + " |")
    lines += ["", f"Failures right behind a kill: {_counted(soak.explained)}."]
    lines.append(f"Failures without a reason: {len(soak.unexplained)}.")
    lines += [f"- {each}" for each in soak.unexplained[:20]]
    lines.append("")
    lines.append("Growth: " + ("; ".join(soak.growth) if soak.growth else "none") + ".")
    lines.append(
        "Open files before the clients came and after they had gone: "
        + ", ".join(f"{role} {before:.0f} and {after:.0f}" for role, (before, after) in soak.files_left.items())
        + "."
    )
    return lines


def _outcomes(soak: Soak) -> list[str]:
    return sorted({outcome for _, outcome in soak.tally.outcomes})


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "none"
