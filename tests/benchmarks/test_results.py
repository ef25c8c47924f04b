"""Statistics, targets and tables made of results, also of those with holes."""

import msgspec
import pytest

from benchmarks import report, targets
from benchmarks.results import (
    Disturbance,
    Load,
    Machine,
    Memory,
    Prompts,
    Results,
    Round,
    ServerResult,
    Spread,
    Start,
    spread,
)

MACHINE = Machine("Some CPU", 2, 16 * 2**30, ["avx2"], "Linux 6")


def load(clients: int, tokens_per_s: float) -> Load:
    return Load(clients, 2 * clients, round(tokens_per_s * 10), 10.0, 0, 0, False, Spread(), Spread(), 0.1)


def one_round(
    number: int = 1, speed: float = 100.0, *, start: float = 5.0, cold: float = 1.0, gap: float = 0.05
) -> Round:
    return Round(
        number,
        start=Start(start, start),
        settled=True,
        loads=[load(clients, speed * clients) for clients in (1, 4, 8, 16, 32)],
        prompts=Prompts(1600, [cold, cold, 9 * cold], [0.05, 0.04, 0.06]),
        disturbance=Disturbance(4, spread([0.02] * 9), spread([0.02, gap]), 2, Spread()),
        memory_idle=Memory(10**9, 2 * 10**9, 4),
        memory_busy=Memory(1_200_000_000, 2 * 10**9, 4),
        others_cpu=0.01,
    )


def server(name: str, *rounds: Round, version: str | None = "1.0") -> ServerResult:
    return ServerResult(name, f"The {name}", version, f"make peers ARGS={name}", [name], {}, list(rounds))


def results(*servers: ServerResult) -> Results:
    return Results("2026-01-01", "abc1234", False, MACHINE, {"torch": "2"}, 60.0, list(servers))


def by_name(run: Results) -> dict[str, targets.Verdict]:
    return {f"{each.what} {each.target}": each for each in targets.verdicts(run)}


def test_percentiles_are_nearest_ranks():
    measured = spread([float(value) for value in range(100, 0, -1)])
    assert measured == Spread(100, 50.0, 90.0, 99.0, 100.0)
    assert spread([3.0]) == Spread(1, 3.0, 3.0, 3.0, 3.0)
    assert spread([]) == Spread()


def test_what_is_shown_is_the_median_of_the_rounds_that_measured_it():
    server_ = server("tailrace", one_round(1, 10.0), one_round(2, 30.0), one_round(3, 20.0), Round(4, failure="died"))
    assert server_.tokens_per_s(8) == pytest.approx(160.0)
    assert server_.tokens_per_s(64) is None


def test_the_first_start_does_not_count_when_there_are_later_ones():
    assert server("a", one_round(start=40.0)).later_start_s() == 40.0
    assert server("a", one_round(start=40.0), one_round(start=6.0), one_round(start=4.0)).later_start_s() == 5.0
    assert server("a").later_start_s() is None


def test_results_survive_their_file(tmp_path):
    run = results(server("tailrace", one_round()), server("vllm", version=None))
    report.write_raw(run, tmp_path)
    assert msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Results) == run


def test_targets_are_held_against_the_better_peer():
    run = results(
        server("tailrace", one_round(speed=100.0, cold=1.0)),
        server("llama-server", one_round(speed=90.0)),
        server("vllm", one_round(speed=50.0, cold=3.0, gap=0.5)),
        server("vllm-all-cores", one_round(speed=60.0, cold=2.0, gap=0.4)),
    )
    found = by_name(run)
    single = found["output tokens/s, 1 client >= 1.15 x llama-server"]
    assert (single.measured, single.beside, single.met) == ("100 = 1.11 x", "The llama-server 90", False)
    eight = found["output tokens/s, 8 clients >= 1.5 x llama-server or vLLM"]
    assert (eight.beside, eight.met) == ("The llama-server 720", False)
    many = found["output tokens/s, 32 clients >= 1.4 x vLLM"]
    assert (many.measured, many.beside, many.met) == ("3200 = 1.67 x", "The vllm-all-cores 1920", True)
    cold = found["cold 1,600-token prompt, first token <= 0.5 x vLLM"]
    assert (cold.measured, cold.beside, cold.met) == ("1.00 s = 0.50 x", "The vllm-all-cores 2.00 s", True)
    gaps = [each for each in targets.verdicts(run) if each.what.startswith("longest")]
    assert [each.met for each in gaps] == [True, True]
    assert gaps[0].measured == "50 ms = 2.5 x"
    assert found["start to first token, second start <= 15 s"].met
    assert found["resident memory, all processes (PSS, 32 clients) <= 1.50 GB"].met


def test_a_target_without_its_peer_is_neither_met_nor_missed():
    run = results(server("tailrace", one_round()), server("vllm", version=None))
    many = by_name(run)["output tokens/s, 32 clients >= 1.4 x vLLM"]
    assert (many.measured, many.beside, many.met) == ("3200", "-", None)


def test_without_any_figure_every_target_is_open():
    assert {each.met for each in targets.verdicts(results())} == {None}
    assert {each.met for each in targets.verdicts(results(server("tailrace", Round(1, failure="died"))))} == {None}


def test_a_peer_that_is_not_installed_is_a_row_that_says_how_to_install_it():
    shown = report.table(results(server("tailrace", one_round()), server("vllm", version=None)))
    assert "| The vllm | `make peers ARGS=vllm` |" in shown
    assert "| | The tailrace |" in shown
    assert "| version | 1.0 |" in shown


def test_the_best_of_a_line_is_bold():
    run = results(server("tailrace", one_round(speed=2.0, cold=3.0)), server("vllm", one_round(speed=1.0, cold=2.0)))
    shown = report.table(run)
    assert "| output tokens/s, c=8 | **16** | 8 |" in shown
    assert "first token (s) | 3.00 | **2.00** |" in shown


def test_a_server_that_failed_says_why_and_leaves_its_cells_empty():
    shown = report.table(results(server("tailrace", one_round()), server("vllm", Round(1, failure="no such option"))))
    assert "- The vllm, round 1: failed: no such option" in shown
    assert "| output tokens/s, c=8 | **800** | - |" in shown


def test_what_makes_a_figure_doubtful_stands_below_the_table():
    doubtful = one_round()
    doubtful.settled = False
    doubtful.loads = [msgspec.structs.replace(load(8, 10.0), cut=True, short=3, failed=2, error="status 500: no")]
    shown = report.table(results(server("tailrace", doubtful)))
    for words in (
        "still busy",
        "cut by the time limit",
        "3 of 16 answers ended early",
        "2 of 16 requests failed (status 500",
    ):
        assert words in shown


def test_plots_and_tables_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="installed by make bench")
    report.write(
        results(server("tailrace", one_round()), server("vllm", version=None), server("llama-server", Round(1))),
        tmp_path,
    )
    images = {"throughput.png", "first-token.png", "token-gaps.png"}
    assert {file.name for file in tmp_path.iterdir()} == images | {"results.json", "results.md"}
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert all(f"({name})" in page for name in images)
    assert "Some CPU" in page


def test_a_run_without_figures_can_be_written_too(tmp_path):
    pytest.importorskip("matplotlib", reason="installed by make bench")
    report.write(results(server("vllm", version=None)), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.md"}
