"""Reads event streams as their clients do."""

import json
import re
from collections.abc import Iterator
from typing import Any


def data_events(text: str) -> list[dict[str, Any]]:
    """The data of a stream without names, which must end with [DONE]; comments left out. Every event has its id."""
    data = [data for _, name, data in numbered_events(text) if name is None]
    assert data[-1] == "[DONE]", text
    return [json.loads(each) for each in data[:-1]]


def named_events(text: str) -> list[dict[str, Any]]:
    """The data of a stream in which each event has its name twice: before its data and as its type; no comments.

    Every event has its id, but for one that tells an error.
    """
    found = []
    for number, (ident, name, data) in enumerate(_events(text)):
        body = json.loads(data)
        assert name == body["type"], text
        if name != "error":
            assert ident is not None, text
            place = body.get("sequence_number", number + 1)
            assert ident.rpartition(":")[2] == str(place), text
        found.append(body)
    return found


def numbered_events(text: str) -> list[tuple[int, str | None, str]]:
    """Number, name and data of each event of a stream that begins with its first; comments left out."""
    found = list(_events(text))
    ids = [ident or "" for ident, _, _ in found]
    request = ids[0].rpartition(":")[0]
    assert request, text
    assert ids == [f"{request}:{place}" for place in range(1, len(ids) + 1)], text
    return [(place, name, data) for place, (_, name, data) in enumerate(found, 1)]


def _events(text: str) -> Iterator[tuple[str | None, str | None, str]]:
    # Comments are lines between the events.
    for block in re.sub(r"(?m)^:.*\n", "", text).split("\n\n"):
        if block:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            assert set(fields) <= {"id", "event", "data"}, block
            yield fields.get("id"), fields.get("event"), fields["data"]
