"""What a line of the log looks like: one event as text for people, or as a JSON object for programs.

An event is a few words that never change and fields that say what they are about this time. Who makes the line (time,
level, process, request) is added here, and here is seen to it that a line is a line: text from outside is escaped,
keys are left out, and 8 KiB are the most.
"""

import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import structlog

# What the lines of one request have in common: its id and, behind a space, its key's owner. Set by the door.
request_label: ContextVar[str] = ContextVar("request_label", default="")

# In bytes, with the end of the line.
LONGEST_LINE = 8192
_MOST_ITEMS = 32
# Keys that stand in somebody else's text, such as a parser's complaint about a header.
_SECRETS = re.compile(
    r"""((?:bearer|basic)\s+|(?:authorization|api[-_]?key|access[-_]?token)\W{1,4}(?:(?:bearer|basic)\s+)?)[^\s"'&,;)]+""",
    re.IGNORECASE,
)
# syslog's levels, as journald reads them from the "<N>" before a line.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
    10: "\\n",
    13: "\\r",
    9: "\\t",
}
# What JSON lets stand in a string, and a terminal or a reader of lines does not.
_UNSAFE_IN_JSON = {code: f"\\u{code:04x}" for code in (*range(127, 160), 0x2028, 0x2029)}
_BARE = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Whose lines need no "logger": ours, and gunicorn's own log.
_OWN = ("tailrace", "workers", "app", "config", "gunicorn")

# What stands before the fields of an event, in this order; no field of an event has one of these names.
_HEAD = ("ts", "level", "process", "pid", "event")


class LineFormatter(structlog.stdlib.ProcessorFormatter):
    """One record, ours or a library's, one line.

    ``json``: an object with ts, level, process, pid and event, request_id and owner in a request, and the event's
    fields. ``journal``: a line starts with its priority, which journald takes off and keeps, and text has no time,
    which journald keeps itself. A traceback is shown on several lines on a ``terminal`` only.
    """

    def __init__(
        self, process: str = "", *, json: bool = False, journal: bool = False, terminal: bool | None = None
    ) -> None:
        super().__init__(processors=[self._complete, self._render], keep_exc_info=False)
        self.process = process
        self._json = json
        self._journal = journal
        self._terminal = (sys.stderr.isatty() if terminal is None else terminal) and not (json or journal)

    def _complete(self, _: Any, __: str, given: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Add who speaks and for whom, and make every value one that can be shown."""
        record: logging.LogRecord = given["_record"]
        body: dict[str, Any] = {
            "ts": _moment(record, utc=self._json),
            "level": record.levelname.lower(),
            "process": self.process or record.name,
            "pid": record.process,
            "event": _shown(given["event"]),
        }
        label = request_label.get()
        if label:
            request_id, _, owner = label.partition(" ")
            body["request_id"] = _shown(request_id)
            if owner:
                body["owner"] = _shown(owner)
        if record.name.partition(".")[0] not in _OWN:
            body["logger"] = _shown(record.name)
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        body.update((name, _shown(value)) for name, value in fields.items() if name not in body)
        if given.get("exc_info"):
            body["exception"] = _traceback(given["exc_info"], withhold=bool(label))
        body["_priority"] = _PRIORITIES.get(record.levelno, 6)
        return body

    def _render(self, _: Any, __: str, body: structlog.typing.EventDict) -> str:
        priority = body.pop("_priority")
        prefix = f"<{priority}>" if self._journal else ""
        room = LONGEST_LINE - len(prefix) - 1
        if self._json:
            return prefix + _bounded(_as_json, dict(body), room)
        trace = str(body.pop("exception", "")) if self._terminal else ""
        if self._journal:
            del body["ts"]
        return prefix + _bounded(_as_text, dict(body), room) + (f"\n{trace}" if trace else "")


def journal_reads(descriptor: int) -> bool:
    """Whether what is written to ``descriptor`` goes to journald, as systemd tells its services."""
    told = os.environ.get("JOURNAL_STREAM", "")
    if not told:
        return False
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


def _moment(record: logging.LogRecord, utc: bool) -> str:
    there = time.gmtime(record.created) if utc else time.localtime(record.created)
    return time.strftime("%Y-%m-%dT%H:%M:%S", there) + f".{int(record.msecs):03d}" + ("Z" if utc else "")


def _shown(value: Any) -> Any:
    """The value as a number, a truth, None, a text without keys, or a list of such."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else str(value)
        case list() | tuple() | set() | frozenset():
            most = [_shown(each) for _, each in zip(range(_MOST_ITEMS), value, strict=False)]
            return most if len(value) <= _MOST_ITEMS else [*most, "..."]
    text = value if isinstance(value, str) else str(value)
    if len(text) > LONGEST_LINE:
        text = text[:LONGEST_LINE] + "..."
    return _SECRETS.sub(r"\1***", text)


def _traceback(failure: Any, withhold: bool) -> str:
    """The traceback; in a request without the exceptions' own words, which may quote its text."""
    if not isinstance(failure, tuple):
        failure = (
            (type(failure), failure, failure.__traceback__) if isinstance(failure, BaseException) else sys.exc_info()
        )
    if not withhold:
        return _SECRETS.sub(r"\1***", "".join(traceback.format_exception(*failure)).rstrip())
    parts: list[str] = []
    error: BaseException | None = failure[1]
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames: TracebackType | None = error.__traceback__
        parts.append(f"{type(error).__qualname__}\n" + "".join(traceback.format_tb(frames)))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "Traceback: " + "\nafter ".join(parts).rstrip()


def _as_json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).translate(_UNSAFE_IN_JSON)


def _as_text(body: Mapping[str, Any]) -> str:
    start = f"{body['ts']} " if "ts" in body else ""
    head = f"{start}{body['level']} {body['process']}[{body['pid']}]: {str(body['event']).translate(_CONTROL)}"
    fields = [f" {name}={_text_value(value)}" for name, value in body.items() if name not in _HEAD]
    return head + "".join(fields)


def _text_value(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "true" if value else "false"
        case str():
            return value if _BARE.fullmatch(value) else _as_json_text(value)
        case list():
            return _text_value(",".join(map(str, value)))
    return str(value)


def _as_json_text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).translate(_UNSAFE_IN_JSON)


def _bounded(render: Callable[[Mapping[str, Any]], str], body: dict[str, Any], room: int) -> str:
    """Return the line; if it has more than ``room`` bytes, its longest values are shortened until it has not."""
    line = _encodable(render(body))
    while (size := len(line.encode())) > room:
        name = max((name for name in body if name not in _HEAD[:4]), key=lambda name: len(str(body[name])))
        text = str(body[name])
        if len(text) <= 16:
            # Very many fields, none of them long: the last ones go.
            del body[list(body)[-1]]
        else:
            # The share of the text that fits, if all of it is as dense as the whole.
            mine = len(_encodable(_as_json_text(text)).encode())
            kept = min(0.9, max(0.0, (mine - (size - room) - 8) / mine))
            body[name] = text.removesuffix("...")[: int((len(text) - 3) * kept)] + "..."
        line = _encodable(render(body))
    return line


def _encodable(line: str) -> str:
    """The line without halves of characters, which no encoding has."""
    return line if line.isascii() else line.encode("utf-8", "replace").decode()
