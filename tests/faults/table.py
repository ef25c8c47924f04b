"""The table of what was done to the service and what came of it: one row for each row of the battery.

A test asks for the fixture ``row`` (see conftest), says what it does, proves that it really happened, and adds up what
became of the requests. ``make faults`` writes the rows as Markdown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One row. ``lost`` counts admitted requests that got neither their whole answer nor an error that says so."""

    id: str
    fault: str = ""
    hit: str = ""
    requests: int = 0
    complete: int = 0
    errors: int = 0
    refused: int = 0
    replayed: int = 0
    lost: int = 0
    longest_gap_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Fail unless the fault really hit, and nothing was lost."""
        assert self.fault, f"{self.id} says nothing of what was done"
        assert self.hit, f"{self.id} does not show that the fault hit"
        assert self.requests > 0, f"{self.id} asked for nothing"
        assert self.lost == 0, self
        assert self.requests == self.complete + self.errors + self.refused, self


_HEAD = (
    "| row | what was done | how it shows that it hit | requests | complete | error | refused | replayed | lost "
    "| longest gap |"
)


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table, sorted by their ids."""
    lines = [_HEAD, "|" + "---|" * 10]
    for row in sorted(rows, key=lambda row: (row.id[0], int(row.id[1:]))):
        figures = (row.requests, row.complete, row.errors, row.refused, row.replayed, row.lost)
        told = "; ".join([row.fault, *row.notes])
        lines.append(f"| {row.id} | {told} | {row.hit} | {' | '.join(map(str, figures))} | {row.longest_gap_s:.1f} s |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], path: Path, preface: str) -> None:
    """Write the table, and before it ``preface``: when, where and how."""
    path.write_text(f"{preface}\n\n{markdown(rows)}", encoding="utf-8")
