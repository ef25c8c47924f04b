"""The log: one line for each event on stderr, for people, journald and grep alike."""

import logging
import os
import sys
import time
from typing import Any

_LONGEST_LINE = 8192
# syslog's levels, as journald reads them from the "<N>" before a line.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)} | {
    10: "\\n",
    13: "\\r",
    9: "\\t",
}


class LineFormatter(logging.Formatter):
    """One record, one line: control characters are escaped, so text from outside cannot forge lines or colours.

    Under journald the line starts with its priority and has no time, which journald keeps itself. A traceback is shown
    on several lines on a terminal only.
    """

    def __init__(self, process: str = "", *, journal: bool | None = None, terminal: bool | None = None) -> None:
        super().__init__()
        self._process = process
        self._journal = "JOURNAL_STREAM" in os.environ if journal is None else journal
        self._terminal = sys.stderr.isatty() if terminal is None else terminal

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of at most 8 KiB."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        start = f"<{_PRIORITIES.get(record.levelno, 6)}>" if self._journal else moment + " "
        line = f"{start}{record.levelname.lower()} {self._process or record.name}[{record.process}]: "
        line += record.getMessage().translate(_CONTROL)
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "\n" + trace if self._terminal and not self._journal else "  " + trace.translate(_CONTROL)
        return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def configure(level: str, process: str) -> None:
    """Send this process's log to stderr; ``process`` names it in each line. Safe to call again, as a reload does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("tailrace", "workers", "app", "config"):
        logging.getLogger(name).setLevel(level.upper())
    # While it is imported it asks for one more package, which would be downloaded code and which nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A log that cannot be written (full disk) must not make logging print its surroundings, keys included, to stderr.
    logging.raiseExceptions = False


def gunicorn_config(level: str) -> dict[str, Any]:
    """Return gunicorn's ``logconfig_dict``: its own log in the same lines; requests are logged by the application."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": "config.logs.LineFormatter", "process": "http"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {"level": level.upper(), "handlers": ["stderr"], "propagate": False},
            "gunicorn.access": {"level": "WARNING", "handlers": ["stderr"], "propagate": False},
            "tailrace": {"level": level.upper()},
            "app": {"level": level.upper()},
        },
    }
