"""One event, one line, whatever is in it."""

import logging
import subprocess
import sys

from config import logs
from config.sources import ROOT


def record(message: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("tailrace.app", level, __file__, 1, message, args, None)


def test_a_line_says_when_how_bad_who_and_what():
    line = logs.LineFormatter("http", journal=False, terminal=False).format(record("took %d tokens", 3))
    moment, level, process, text = line.split(" ", 3)
    assert moment[4] == "-"
    assert (level, process.partition("[")[0], text) == ("info", "http", "took 3 tokens")


def test_text_from_outside_cannot_forge_a_line():
    line = logs.LineFormatter(journal=False, terminal=False).format(record("name %s", "a\nb\r\x1b[31m\u2028c"))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert r"a\nb\r\x1b[31m" in line


def test_under_journald_the_priority_stands_first_and_no_time():
    line = logs.LineFormatter("pool", journal=True, terminal=False).format(record("gone", level=logging.ERROR))
    assert line.startswith("<3>error pool[")


def test_a_traceback_stays_on_the_line_unless_on_a_terminal():
    try:
        raise ValueError("broken")
    except ValueError:
        failure = record("failed")
        failure.exc_info = sys.exc_info()
    assert "\n" not in logs.LineFormatter(journal=False, terminal=False).format(failure)
    assert "\nTraceback" in logs.LineFormatter(journal=False, terminal=True).format(failure)


def test_a_line_is_bounded():
    assert len(logs.LineFormatter(journal=False, terminal=False).format(record("x" * 100_000))) == 8192


def test_a_library_that_misses_an_optional_package_does_not_tell_the_operator():
    script = "from config import logs; logs.configure('info', 'worker-0'); import bitsandbytes"
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "kernels" not in shown.stdout + shown.stderr
