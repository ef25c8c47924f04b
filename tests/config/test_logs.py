"""One event, one line, whatever is in it and wherever it goes."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config import log_lines, logs
from config.log_output import LineHandler
from config.sources import ROOT

TEXT = logs.LineFormatter("http", terminal=False)
JSON = logs.LineFormatter("http", json=True)


@pytest.fixture(autouse=True)
def no_request() -> None:
    """A test client of another test may have left an answer open, and so its request's id."""
    logs.request_label.set("")


@pytest.fixture
def in_a_request() -> Iterator[None]:
    token = logs.request_label.set("req_1 alice")
    yield
    logs.request_label.reset(token)


def record(event: str, /, level: int = logging.INFO, name: str = "tailrace.app", **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord(name, level, __file__, 1, event, None, None)
    made.__dict__["fields"] = fields
    return made


def failed(raising: Callable[[], None]) -> logging.LogRecord:
    made = record("failed")
    try:
        raising()
    except Exception:
        made.exc_info = sys.exc_info()
    return made


# --- what a line says -------------------------------------------------------------------------------------------------


def test_a_line_says_when_how_bad_who_and_what():
    line = TEXT.format(record("model loaded", seconds=1.23456789, title="a b", parts=["x", "y"], whole=True, rest=None))
    moment, level, process, text = line.split(" ", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}", moment)
    assert (level, process) == ("info", f"http[{os.getpid()}]:")
    assert text == 'model loaded seconds=1.23457 title="a b" parts=x,y whole=true rest=-'


def test_as_json_a_line_is_an_object_of_the_same():
    shown = json.loads(JSON.format(record("model loaded", seconds=0.5, title="a b", parts=["x", "y"], rest=None)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown.pop("ts"))
    assert shown == {
        "level": "info",
        "process": "http",
        "pid": os.getpid(),
        "event": "model loaded",
        "seconds": 0.5,
        "title": "a b",
        "parts": ["x", "y"],
        "rest": None,
    }


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": 1}, b"\xff", Path("/x"), "\udc80", object, 10**400]
)
def test_whatever_a_value_is_the_line_is_json(value: object):
    line = JSON.format(record("odd", value=value))
    assert json.loads(line.encode())["event"] == "odd"


def test_no_field_takes_the_place_of_what_every_line_says(in_a_request: None):
    made = record("x", pid=1)
    made.__dict__["fields"] |= {"level": "none", "request_id": "other", "event": "y"}
    shown = json.loads(JSON.format(made))
    assert (shown["level"], shown["pid"], shown["request_id"], shown["event"]) == ("info", os.getpid(), "req_1", "x")


def test_the_lines_of_a_request_say_so(in_a_request: None):
    assert TEXT.format(record("accepted", id="a")).endswith("]: accepted request_id=req_1 owner=alice id=a")
    shown = json.loads(JSON.format(record("accepted")))
    assert (shown["request_id"], shown["owner"]) == ("req_1", "alice")


def test_who_else_speaks_is_named():
    assert TEXT.format(record("hm", name="urllib3.pool")).endswith("]: hm logger=urllib3.pool")
    assert json.loads(JSON.format(record("hm", name="urllib3.pool")))["logger"] == "urllib3.pool"


# --- text from outside ------------------------------------------------------------------------------------------------

HOSTILE = "a\nb\r\x1b[31m\u2028c\x85\x00\u2029\x9b"


def test_text_from_outside_cannot_forge_a_line():
    for formatter in (TEXT, JSON):
        for made in (record(HOSTILE), record("x", value=HOSTILE), record("x", value=[HOSTILE])):
            line = formatter.format(made)
            assert len(line.splitlines()) == 1
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line)
    assert json.loads(JSON.format(record("x", value=HOSTILE)))["value"] == HOSTILE


def test_a_value_cannot_look_like_another_field():
    assert TEXT.format(record("x", value="a owner=bob")).endswith('value="a owner=bob"')
    assert TEXT.format(record("x", value='"')).endswith(r'value="\""')
    assert TEXT.format(record("x", value="")).endswith('value=""')


@pytest.mark.parametrize("formatter", [TEXT, JSON], ids=["text", "json"])
@pytest.mark.parametrize(
    "text",
    [
        "Invalid HTTP Header: 'Authorization: Bearer sk-secret'",
        "Invalid HTTP Header: 'AUTHORIZATION : sk-secret'",
        "{'x-api-key': 'sk-secret'}",
        "GET /v1/models?api_key=sk-secret&a=1",
        "bearer sk-secret",
    ],
)
def test_a_key_in_somebody_elses_text_is_left_out(text: str, formatter: logs.LineFormatter):
    for made in (record(text), record("x", value=text), failed(lambda: exec("raise ValueError(text)", {"text": text}))):
        line = formatter.format(made)
        assert "secret" not in line
        assert "***" in line


def test_in_a_request_the_words_of_an_exception_are_withheld_but_not_where_it_was(in_a_request: None):
    def fail() -> None:
        try:
            raise KeyError("the prompt")
        except KeyError:
            raise ValueError("the prompt") from None

    for formatter in (TEXT, JSON):
        line = formatter.format(failed(fail)).replace('\\"', '"')
        # The line of the source is shown; what came to it is not.
        assert line.count("the prompt") == line.count('raise ValueError("the prompt")')
        assert "ValueError" in line
        assert "KeyError" not in line.replace("except KeyError", "")
        assert "test_logs.py" in line


def test_a_traceback_stays_on_the_line_unless_on_a_terminal():
    def fail() -> None:
        raise ValueError("broken")

    assert "\n" not in TEXT.format(failed(fail))
    assert "broken" in json.loads(JSON.format(failed(fail)))["exception"]
    assert "\nTraceback" in logs.LineFormatter(terminal=True).format(failed(fail))
    assert "\n" not in logs.LineFormatter(terminal=True, journal=True).format(failed(fail))


# --- how long a line is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatter", [TEXT, JSON, logs.LineFormatter(journal=True)], ids=["text", "json", "journal"])
@pytest.mark.parametrize("filler", ["x", "\u4f60\u597d", "\u2028", "\x01", '"\\', "\U0001f600"])
def test_a_line_is_bounded_in_bytes_and_still_a_line(formatter: logs.LineFormatter, filler: str):
    many = {f"f{number}": filler * 100 for number in range(300)}
    for made in (record(filler * 100_000), record("x", value=filler * 100_000, other="y"), record("x", **many)):
        line = formatter.format(made)
        assert 4000 < len(line.encode()) + 1 <= log_lines.LONGEST_LINE
        if formatter is JSON:
            assert json.loads(line)["pid"] == os.getpid()
    if formatter is JSON:
        shown = json.loads(formatter.format(record("x", value=filler * 100_000, other="y")))
        assert (shown["event"], shown["other"]) == ("x", "y")
        assert shown["value"].removesuffix("...").startswith(filler * 100)


# --- journald ---------------------------------------------------------------------------------------------------------


def test_under_journald_the_priority_stands_first_and_text_has_no_time():
    assert logs.LineFormatter("pool", journal=True).format(record("gone", logging.ERROR)).startswith("<3>error pool[")
    line = logs.LineFormatter("pool", journal=True, json=True).format(record("gone", logging.WARNING))
    assert line.startswith("<4>{")
    assert json.loads(line[3:])["level"] == "warning"


def test_only_what_really_goes_to_the_journal_has_priorities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A service's child whose standard error goes elsewhere has the variable too."""
    with (tmp_path / "f").open("wb") as file:
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert log_lines.journal_reads(file.fileno())
        assert not log_lines.journal_reads(2)
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not log_lines.journal_reads(file.fileno())


# --- loggers ----------------------------------------------------------------------------------------------------------


def test_an_event_reaches_loggings_handlers_with_its_fields(caplog: pytest.LogCaptureFixture):
    log = logs.logger("tailrace.test")
    with caplog.at_level(logging.INFO, "tailrace.test"):
        log.debug("quiet", a=1)
        log.info("keys changed", keys=3, name="x", process="y")
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("failed")
    assert caplog.messages == ["keys changed", "failed"]
    assert caplog.records[0].__dict__["fields"] == {"keys": 3, "name": "x", "process": "y"}
    assert "ValueError: broken" in JSON.format(caplog.records[1])


def run(script: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        **({"stderr": subprocess.PIPE} | options),
    )


BEGIN = "from config import logs; logs.configure(logs.LogSettings('info', 'json'), 'pool'); "


@pytest.mark.parametrize(
    ("script", "level", "event", "words"),
    [
        ("import warnings; warnings.warn('old')", "warning", "warning of a library", "old"),
        ("import logging; logging.getLogger('lib').warning('%d odd', 3)", "warning", "3 odd", "lib"),
        ("import logging; logging.getLogger('lib').info('chatter')", None, "", ""),
        ("logs.logger('tailrace.x').warning('gone', worker=1)", "warning", "gone", ""),
        ("logs.logger('tailrace.x').debug('detail', worker=1)", None, "", ""),
        ("1 / 0", "critical", "uncaught exception", "ZeroDivisionError"),
        (
            "import threading; t = threading.Thread(target=lambda: 1 / 0, name='t1'); t.start(); t.join()",
            "error",
            "uncaught exception",
            "ZeroDivisionError",
        ),
        ("\nclass A:\n    def __del__(self): 1 / 0\nA()", "error", "exception ignored", "ZeroDivisionError"),
        ("import logging; logging.getLogger('lib').warning('%d', 'x')", None, "", ""),
    ],
)
def test_all_that_a_process_says_is_an_event(script: str, level: str | None, event: str, words: str):
    lines = run(BEGIN + script).stderr.splitlines()
    if level is None:
        assert lines == []
        return
    (line,) = lines
    shown = json.loads(line)
    assert (shown["level"], shown["event"], shown["process"]) == (level, event, "pool")
    assert words in line


def test_a_library_that_misses_an_optional_package_does_not_tell_the_operator():
    shown = run("from config import logs; logs.configure('info', 'worker-0'); import bitsandbytes")
    assert (shown.returncode, "kernels" in shown.stdout + shown.stderr) == (0, False)


def test_gunicorns_own_log_is_made_of_the_same_lines(tmp_path: Path):
    file = tmp_path / "log"
    script = (
        "import logging, logging.config; from pathlib import Path; from config import logs; "
        f"settings = logs.LogSettings('info', 'json', Path({str(file)!r})); "
        "logging.config.dictConfig(logs.gunicorn_config(settings)); "
        "logging.getLogger('gunicorn.error').info('Booting worker with pid: %s', 7); logs.rename('http'); "
        "logs.logger('tailrace.requests').info('accepted', id='a')"
    )
    assert run(script).stderr == ""
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["process"], first["event"]) == ("arbiter", "Booting worker with pid: 7")
    assert (second["process"], second["event"], second["id"]) == ("http", "accepted", "a")


# --- what is told before there is a log -------------------------------------------------------------------------------


def test_a_complaint_is_one_line_for_people_or_programs(capsys: pytest.CaptureFixture[str]):
    logs.complain(["--port: in use"])
    logs.complain(["running on the CPU"], "warning")
    assert capsys.readouterr().err == "tailrace: error: --port: in use\ntailrace: running on the CPU\n"
    logs.complain(["--port: in use"], form="json")
    shown = json.loads(capsys.readouterr().err)
    assert (shown["level"], shown["event"], shown["process"]) == ("error", "--port: in use", "start")


# --- where lines go ---------------------------------------------------------------------------------------------------


def handler(path: Path) -> LineHandler:
    made = LineHandler(path)
    made.setFormatter(JSON)
    return made


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_a_line_is_one_call_so_lines_of_many_threads_do_not_mix(tmp_path: Path):
    path = tmp_path / "log"
    writers = [handler(path) for _ in range(4)]

    def write(own: LineHandler) -> None:
        for number in range(100):
            own.emit(record("x" * 5000, number=number))

    threads = [threading.Thread(target=write, args=(own,)) for own in writers]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(events(path)) == 400


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path):
    path = tmp_path / "log"
    own = handler(path)
    own.emit(record("one"))
    path.rename(tmp_path / "log.1")
    own.emit(record("two"))
    path.unlink()
    own.emit(record("three"))
    assert [each["event"] for each in events(tmp_path / "log.1")] == ["one"]
    assert [each["event"] for each in events(path)] == ["three"]
    assert path.stat().st_mode & 0o137 == 0


def test_what_gunicorn_does_on_usr1_opens_it_anew(tmp_path: Path):
    """As `gunicorn.glogging.Logger.reopen_files`."""
    path = tmp_path / "log"
    own = handler(path)
    path.rename(tmp_path / "log.1")
    assert isinstance(own, logging.FileHandler)
    assert own.stream
    own.close()
    own.stream = own._open()
    own.emit(record("two"))
    assert [each["event"] for each in events(path)] == ["two"]


FULL = """
import logging, os, resource, sys
from pathlib import Path
from config import log_output, logs
logs.configure(logs.LogSettings("info", "json", Path(sys.argv[1]) if len(sys.argv) > 1 else None), "pool")
log = logs.logger("tailrace.test")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
log.info("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
for number in range(10):
    log.info("during", number=number, key="Bearer sk-secret")
assert log_output.lost_lines() >= 8, log_output.lost_lines()
if os.fork() == 0:
    assert log_output.lost_lines() == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.info("of a child")
    os._exit(0)
os.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.info("after")
log.info("later")
"""


def test_lines_that_do_not_fit_on_the_disk_are_counted_and_told_once(tmp_path: Path):
    path = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = list(filter(None, path.read_text().splitlines()))
    # But for one that the disk took half of; nothing is appended to that.
    shown = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(lines) - len(shown) <= 1
    told = [each for each in shown if each["event"] == "log lines lost"]
    assert [each["event"] for each in shown if each["event"] != "during"] == [
        "before",
        "of a child",
        "log lines lost",
        "after",
        "later",
    ]
    assert told[0]["lines"] >= 8
    assert told[0]["reason"] == "File too large"
    assert told[0]["level"] == "warning"


def test_a_log_on_a_full_device_costs_nothing_but_the_lines():
    script = BEGIN + (
        "from config import log_output; log = logs.logger('tailrace.x'); log.info('a', key='Bearer sk-secret'); "
        "log.error('b'); print(log_output.lost_lines())"
    )
    with Path("/dev/full").open("wb") as full:
        done = run(script, stderr=full)
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_a_reader_that_does_not_read_holds_nobody_up():
    """Such as a terminal that was stopped; the lines are counted, and told when it reads again."""
    script = BEGIN + (
        "import sys; from config import log_output; log = logs.logger('tailrace.x')\n"
        "for number in range(200): log.info('x' * 2000, number=number)\n"
        "print(log_output.lost_lines(), flush=True); sys.stdin.read(); log.info('again')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stderr is not None
        lost = int(child.stdout.readline())
        assert lost > 100
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(child.stderr or []))
        # Whoever reads again makes room before the next line comes.
        first = [child.stderr.readline() for _ in range(5)]
        reader.start()
        child.stdin.close()
        reader.join(60)
        assert child.wait(60) == 0
    shown = [json.loads(line) for line in [*first, *lines]]
    assert (shown[-2]["event"], shown[-2]["lines"]) == ("log lines lost", lost)
    assert shown[-1]["event"] == "again"


def test_hooks_of_this_process_are_its_own():
    """None of the above has changed how the tests themselves report."""
    assert "logs" not in getattr(warnings.showwarning, "__module__", "")
