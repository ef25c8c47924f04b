"""The log of every process: one line for each event, on standard error or in a file.

Modules take their `logger` and say an event, a few words that never change, and its fields:

    log = logs.logger("tailrace.requests")
    log.info("accepted", id=job.id, prompt_tokens=12)

What libraries log, warn of or fail with in a thread of their own comes out in the same lines.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import structlog

from config.log_lines import LineFormatter, journal_reads, request_label
from config.log_output import LineHandler, lost_lines

__all__ = ["LineFormatter", "LogSettings", "Logger", "complain", "configure", "logger", "lost_lines", "request_label"]

Logger = structlog.stdlib.BoundLogger
Form = Literal["auto", "text", "json"]

# Whose lines follow the chosen level; all others show warnings and worse.
_OWN = ("tailrace", "workers", "app", "config")


class Chosen(Protocol):
    """What of `config.settings.Settings` is about the log."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> Form: ...
    @property
    def log_file(self) -> Path | None: ...


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged, how and where: ``file`` None is standard error."""

    level: str = "info"
    form: Form = "auto"
    file: Path | None = None

    @classmethod
    def of(cls, settings: "Chosen") -> "LogSettings":
        """Return what the service's settings say of the log."""
        return cls(settings.log_level, settings.log_format, settings.log_file)

    def formatter(self, process: str) -> LineFormatter:
        """Return what makes the lines of a process of this name."""
        journal = self.file is None and journal_reads(2)
        terminal = self.file is None and sys.stderr.isatty()
        return LineFormatter(process, json=self.form == "json", journal=journal, terminal=terminal)


_present = LogSettings()


def present() -> LogSettings:
    """Return how this process logs."""
    return _present


def logger(name: str) -> Logger:
    """Return the structlog logger over logging's logger ``name``; it costs next to nothing below the level."""
    made = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _as_record,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return cast(Logger, made)


def configure(settings: LogSettings | str, process: str) -> None:
    """Send this process's log where ``settings`` (or just a level) say; ``process`` names it in each line.

    Safe to call again, as a reload does.
    """
    global _present
    _present = settings if isinstance(settings, LogSettings) else LogSettings(settings)
    handler = LineHandler(_present.file)
    handler.setFormatter(_present.formatter(process))
    root = logging.getLogger()
    old, root.handlers[:] = list(root.handlers), [handler]
    for each in old:
        if isinstance(each, LineHandler):
            each.close()
    root.setLevel(logging.WARNING)
    for name in _OWN:
        logging.getLogger(name).setLevel(_present.level.upper())
    take_over()


def change(level: str, form: Form) -> None:
    """Log so from now on; where to stays as it is, and so does the process's name."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    name = next((each.process for each in formatters if isinstance(each, LineFormatter)), "")
    configure(LogSettings(level, form, _present.file), name)


def take_over() -> None:
    """Turn what would be printed past the log into events: warnings, exceptions of threads, uncaught exceptions."""
    # While it is imported it asks for one more package, which would be downloaded code and which nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A log that cannot be written (full disk) must not make logging print its surroundings, keys included, to stderr.
    logging.raiseExceptions = False
    warnings.showwarning = _show_warning
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _ignored


def gunicorn_config(settings: LogSettings | str, process: str = "arbiter") -> dict[str, Any]:
    """Return gunicorn's ``logconfig_dict``: its own log in the same lines; requests are logged by the application."""
    global _present
    _present = settings = settings if isinstance(settings, LogSettings) else LogSettings(settings)
    level = settings.level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": settings.formatter, "process": process}},
        "handlers": {
            "lines": {
                "class": "config.log_output.LineHandler",
                "formatter": "line",
                "path": str(settings.file) if settings.file else None,
            }
        },
        "root": {"level": "WARNING", "handlers": ["lines"]},
        "loggers": {
            "gunicorn.error": {"level": level, "handlers": ["lines"], "propagate": False},
            "gunicorn.access": {"level": "WARNING", "handlers": ["lines"], "propagate": False},
            **{name: {"level": level} for name in _OWN},
        },
    }


def rename(process: str) -> None:
    """Let the lines of this process, a fork of another one, have a name of their own."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, LineFormatter):
            handler.formatter.process = process


def complain(problems: Iterable[str], level: Literal["error", "warning"] = "error", form: Form | None = None) -> None:
    """Tell the operator on standard error, before there is a log: ``tailrace: error: ...``, or a line of JSON."""
    chosen = form or cast(Form, os.environ.get("TAILRACE_LOG_FORMAT", "auto"))
    for problem in problems:
        if chosen == "json":
            record = logging.LogRecord("tailrace", logging.getLevelName(level.upper()), "", 0, problem, None, None)
            line = LogSettings(form="json").formatter("start").format(record)
        else:
            line = f"tailrace: error: {problem}" if level == "error" else f"tailrace: {problem}"
            if journal_reads(2):
                line = f"<{3 if level == 'error' else 4}>{line}"
        # Nobody to tell is no reason to fail.
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            return


def _as_record(_: Any, __: str, event: structlog.typing.EventDict) -> Any:
    """The event as arguments for logging: its words as the message, its fields beside it."""
    words = event.pop("event")
    kept = {name: event.pop(name) for name in ("exc_info", "stack_info") if name in event}
    return (words,), {"extra": {"fields": event}, **kept}


_library = logger("tailrace.library")


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    where = f"{Path(filename).parent.name}/{Path(filename).name}:{lineno}"
    _library.warning("warning of a library", kind=category.__name__, text=str(message), where=where)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        _library.critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        name = args.thread.name if args.thread else ""
        failure = (args.exc_type, args.exc_value, args.exc_traceback)
        _library.error("uncaught exception", thread=name, exc_info=failure)


def _ignored(args: Any) -> None:
    failure = (args.exc_type, args.exc_value, args.exc_traceback)
    _library.error("exception ignored", text=args.err_msg or "", exc_info=failure)
