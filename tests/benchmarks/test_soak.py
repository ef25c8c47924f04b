"""The soak's judgement: what is growth, and what a kill explains."""

import pytest

from benchmarks.soak import EXPLAINED_S, Series, Soak, explain, judge, slope
from benchmarks.soak_clients import _end_of_stream

HOUR = 3600.0
MEGABYTE = 2.0**20


def soak(megabytes_per_hour: float = 0.0, files_per_hour: float = 0.0) -> Soak:
    made = Soak(60, 1, judged=(HOUR / 2, HOUR), kills=[100.0])
    series = made.series["HTTP workers"] = Series()
    for at in range(0, 3600, 5):
        wobble = (at % 7) * MEGABYTE
        series.at.append(at)
        series.own.append(200 * MEGABYTE + wobble + at / HOUR * megabytes_per_hour * MEGABYTE)
        series.files.append(30 + at / HOUR * files_per_hour)
        series.threads.append(6)
        series.count.append(2)
    return made


def test_the_slope_is_that_of_the_straight_line():
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == 2
    assert slope([1], [5]) == 0
    assert slope([1, 1], [5, 6]) == 0


def test_what_goes_up_and_down_is_no_growth():
    calm = soak()
    judge(calm)
    assert calm.growth == []


def test_memory_and_files_that_grow_are_found():
    leaking = soak(megabytes_per_hour=40, files_per_hour=30)
    judge(leaking)
    assert [each.split(" grew")[0] for each in leaking.growth] == [
        "HTTP workers: own memory",
        "HTTP workers: open files",
    ]


def test_only_what_comes_right_behind_a_kill_is_explained():
    made = soak()
    made.tally.surprises = [(1101.0, "whole: 503"), (1099.0 + EXPLAINED_S, "stream: cut"), (1500.0, "whole: 500")]
    explain(made, 1000.0)
    assert made.explained == {"whole": 1, "stream": 1}
    assert made.unexplained == ["500 s, whole: 500"]


def test_a_stream_without_its_end_is_a_surprise():
    assert _end_of_stream(b'data: {"id":"x"}\n\ndata: [DONE]\n\n') == ("200", "")
    assert _end_of_stream(b'data: {"error":{"type":"rate_limit_error"}}\n\n') == ("429 in the stream", "")
    assert _end_of_stream(b'data: {"error":{"type":"server_error"}}\n\n')[0] == "error event"
    assert _end_of_stream(b'data: {"id":"x"}\n\n') == ("cut", 'data: {"id":"x"}\n\n')


def test_the_report_has_curves_and_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="installed by make bench")
    from benchmarks.soak_report import write

    made = soak(files_per_hour=30)
    made.tally.note("whole", "200")
    made.files_left = {"HTTP workers": (20, 21)}
    judge(made)
    write(made, tmp_path)
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "soak.md").read_text()
    assert "| HTTP workers | 2" in text
    assert "open files grew by 15" in text
