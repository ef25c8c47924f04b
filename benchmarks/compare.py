"""Tailrace beside its peers on this machine: `make bench`, or ``python -m benchmarks.compare [--quick]``.

Every server found installed is started, measured and stopped, one after the other; then all of them again, for as many
rounds as asked for, so that a machine that drifts does so for everybody. What is shown are medians over the rounds.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from benchmarks import machine, report, rounds
from benchmarks.peers import ROOT, WEIGHTS
from benchmarks.prompts import TokenCounter
from benchmarks.results import Results, ServerResult
from benchmarks.scenarios import QUICK, Sizes
from benchmarks.servers import CONCURRENCY, SCENARIOS, Server, all_servers, tokenizer_file

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and write results.json, results.md and the plots. Returns the exit status."""
    options = _options(arguments)
    whole = not (options.quick or options.only or options.clients or set(options.scenarios) != set(SCENARIOS))
    # The results of the last whole run are kept in the repository; a partial one must not take their place.
    out = options.out or (RESULTS if whole or options.render else RESULTS / "partial")
    if options.render:
        report.write(msgspec.json.decode(options.render.read_bytes(), type=Results), out)
        return 0
    if not WEIGHTS.version:
        print("benchmarks: no tokenizer to count tokens with: python -m benchmarks.peers weights", file=sys.stderr)
        return 2
    # Ended from outside, the server under test must end too: with an exception the blocks that started it are left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    servers = [each for each in all_servers() if not options.only or each.name in options.only]
    results = Results(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=machine.commit(),
        quick=options.quick,
        machine=machine.machine(),
        versions=machine.versions(),
        servers=[_empty(each) for each in servers],
    )
    sizes = QUICK if options.quick else Sizes()
    if options.clients:
        sizes = replace(sizes, concurrency=options.clients)
    run(servers, results, options.rounds or (1 if options.quick else 3), options.scenarios, sizes, out)
    report.write(results, out)
    print(f"\n{report.table(results)}\nwritten to {out}")
    return 0


def run(
    servers: Sequence[Server], results: Results, number: int, wanted: Sequence[str], sizes: Sizes, out: Path
) -> None:
    """Fill ``results`` with ``number`` rounds of each installed server; the raw figures are on disk after each."""
    count = TokenCounter(tokenizer_file())
    began = time.perf_counter()
    for round_number in range(1, number + 1):
        for server, result in zip(servers, results.servers, strict=True):
            if server.version is None or (server.slow and round_number > 1):
                continue
            say(f"round {round_number}: {server.title} {server.version}", began)
            result.rounds.append(
                rounds.measure(server, round_number, wanted, sizes, count, lambda line: say(f"    {line}", began))
            )
            results.seconds = time.perf_counter() - began
            report.write_raw(results, out)


def say(line: str, began: float) -> None:
    """Print a line with the time since the suite began."""
    seconds = round(time.perf_counter() - began)
    print(f"{seconds // 60:3d}:{seconds % 60:02d}  {line}", flush=True)


def _empty(server: Server) -> ServerResult:
    # Where the checkout lies is nobody's business.
    command = [word.removeprefix(f"{ROOT}/") for word in server.command]
    return ServerResult(server.name, server.title, server.version, server.how_to_install, command, server.environment)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [each.name for each in all_servers()]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--only", action="append", choices=names, help="only this server; repeatable")
    parser.add_argument(
        "--scenarios", type=lambda text: text.split(","), default=SCENARIOS, metavar="A,B", help=", ".join(SCENARIOS)
    )
    parser.add_argument(
        "--clients",
        type=lambda text: tuple(map(int, text.split(","))),
        metavar="N,N",
        help=f"throughput with so many only, of {', '.join(map(str, CONCURRENCY))}",
    )
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small loads that show that everything works")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results, or partial/ in it")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="measure nothing: table and plots of an earlier run"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
