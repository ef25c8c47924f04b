"""Results as files: results.json with all raw figures, results.md with the tables, and the plots."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks import figures, targets
from benchmarks.results import Results, Round, ServerResult
from benchmarks.servers import CONCURRENCY

Value = Callable[[ServerResult], float | None]
Best = Callable[[Sequence[float]], float]


def write_raw(results: Results, out: Path) -> None:
    """Write results.json; the directory is made if there is none."""
    out.mkdir(parents=True, exist_ok=True)
    raw = msgspec.json.format(msgspec.json.encode(results), indent=1)
    (out / "results.json").write_bytes(raw + b"\n")


def write(results: Results, out: Path) -> None:
    """Write results.json, results.md and the plots."""
    # Only here: matplotlib is installed for `make bench` alone.
    from benchmarks import plots

    write_raw(results, out)
    images = plots.write(results, out)
    shown = "".join(f"![{caption}]({file.name})\n\n" for file, caption in images)
    (out / "results.md").write_text(f"{_heading(results)}\n{table(results)}\n{shown}".rstrip() + "\n", encoding="utf-8")


def table(results: Results) -> str:
    """Return the tables in Markdown: figures by server, targets, and how quiet the machine was."""
    parts = [_figures(results), _targets(results), _notes(results)]
    return "\n".join(part for part in parts if part)


def _heading(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    features = ", ".join(machine.cpu_features)
    rounds = max((len(server.rounds) for server in results.servers), default=0)
    return (
        f"# Tailrace beside its peers{' (quick run: figures mean little)' if results.quick else ''}\n\n"
        f"{results.date}, commit {results.commit}; {machine.cpu}, {machine.cores} cores ({features}), "
        f"{machine.memory_bytes / 2**30:.0f} GiB; {machine.system}; {versions}. "
        f"Medians of {rounds} round{'s' if rounds != 1 else ''}, {results.seconds / 60:.0f} minutes in all. "
        "The best figure of a line is bold. What the figures mean: docs/benchmarks.md.\n"
    )


def _figures(results: Results) -> str:
    servers = [server for server in results.servers if server.version is not None]
    lines = ["| | " + " | ".join(server.title for server in servers) + " |"]
    lines.append("|---" * (len(servers) + 1) + "|")
    lines.append("| version | " + " | ".join(server.version or "" for server in servers) + " |")
    for name, value, form, best in _rows():
        values = [value(server) for server in servers]
        measured = [each for each in values if each is not None]
        if measured:
            cells = ["-" if each is None else form.format(each) for each in values]
            first = form.format(best(measured))
            lines.append(f"| {name} | " + " | ".join(f"**{cell}**" if cell == first else cell for cell in cells) + " |")
    text = "\n".join(lines) + "\n" if servers else ""
    missing = [server for server in results.servers if server.version is None]
    if missing:
        text += "\n| not installed | how to install it |\n|---|---|\n"
        text += "".join(f"| {server.title} | `{server.how_to_install}` |\n" for server in missing)
    return text


def _rows() -> Iterator[tuple[str, Value, str, Best]]:
    """Yield each line of the table: name, value, format, and which of two values is the better one."""
    for clients in CONCURRENCY:
        yield f"output tokens/s, c={clients}", _tokens_per_s(clients), "{:.0f}", max
    yield "cold 1,600-token prompt, first token (s)", _median(figures.cold_s), "{:.2f}", min
    yield "the same prefix again, first token (ms)", _median(figures.again_s, 1000), "{:.0f}", min
    yield "4 streams: normal token gap (ms)", _median(figures.normal_gap, 1000), "{:.0f}", min
    yield "4 streams: longest gap while long prompts arrive (ms)", _median(figures.longest_gap, 1000), "{:.0f}", min
    median, p90, p99 = (lambda s: s.p50), (lambda s: s.p90), (lambda s: s.p99)
    yield "fixed rate: first token, median (ms)", _median(figures.rate_first_token(median), 1000), "{:.0f}", min
    yield "fixed rate: first token, 90 % (ms)", _median(figures.rate_first_token(p90), 1000), "{:.0f}", min
    yield "fixed rate: token gap, 99 % (ms)", _median(figures.rate_gap(p99), 1000), "{:.0f}", min
    yield "start to first token (s)", ServerResult.later_start_s, "{:.1f}", min
    yield "memory after the load, PSS (GB)", _median(figures.idle_pss, 1e-9), "{:.2f}", min
    yield "memory at c=32, PSS (GB)", _median(figures.busy_pss, 1e-9), "{:.2f}", min
    yield "memory at c=32, sum of RSS (GB)", _median(figures.busy_rss, 1e-9), "{:.2f}", min


def _tokens_per_s(clients: int) -> Value:
    return lambda server: server.tokens_per_s(clients)


def _median(figure: figures.Figure, factor: float = 1.0) -> Value:
    def scaled(server: ServerResult) -> float | None:
        found = server.median(figure)
        return None if found is None else found * factor

    return scaled


def _targets(results: Results) -> str:
    lines = ["| target | wanted | measured | beside | met |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "**no**", None: "-"}
    lines += [
        f"| {each.what} | {each.target} | {each.measured} | {each.beside} | {words[each.met]} |"
        for each in targets.verdicts(results)
    ]
    return "\n".join(lines) + "\n"


def _notes(results: Results) -> str:
    notes = [f"- {server.title}, round {each.number}: {note}" for server in results.servers for each in server.rounds
             for note in _troubles(each)]  # fmt: skip
    others = [each.others_cpu for server in results.servers for each in server.rounds if each.others_cpu is not None]
    if others:
        notes.append(f"- CPU time of the machine that others took: {min(others):.1%} to {max(others):.1%}, by round")
    return "\n".join(notes) + "\n" if notes else ""


def _troubles(round_: Round) -> Sequence[str]:
    found = [f"failed: {round_.failure}"] if round_.failure else []
    if round_.settled is False:
        found.append("was still busy a minute after its start, when the loads began")
    for load in [*round_.loads, *([round_.rate] if round_.rate else [])]:
        name = f"{load.clients} clients" if load.clients else "fixed rate"
        if load.cut:
            found.append(f"{name}: cut by the time limit, counted until then")
        if load.short:
            found.append(f"{name}: {load.short} of {load.requests} answers ended early")
        if load.failed:
            found.append(f"{name}: {load.failed} of {load.requests} requests failed ({load.error})")
    for part, what in ((round_.prompts, "long prompts"), (round_.disturbance, "disturbed streams")):
        if part and part.error:
            found.append(f"{what}: {part.error}")
    return found
