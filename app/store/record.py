"""A record: one thing that is kept; how records are asked for, and how much of them is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

RUNNING = ("queued", "in_progress")


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept: number of records, their bytes, seconds since they were last used."""

    max_items: int
    max_bytes: int
    max_age_s: float


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that is kept for a tenant: the answer (``body``) and what it answers (``input``), as JSON values.

    ``previous``: the record that it continues. ``items``: ids by which parts of its input can be referred to.
    """

    id: str
    kind: str
    tenant: str
    model: str
    status: str
    body: dict[str, Any]
    input: Sequence[Mapping[str, Any]] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    previous: str | None = None
    items: Sequence[str] = ()

    @property
    def is_running(self) -> bool:
        """Whether somebody still works on it."""
        return self.status in RUNNING


@dataclass(frozen=True, slots=True)
class Listing:
    """Which records to list: behind ``after`` in this order, of this model, with all of this metadata.

    So many of them as there are bytes for, but at least one.
    """

    limit: int = 20
    order: Literal["asc", "desc"] = "asc"
    after: str | None = None
    model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = 2**63


@dataclass(frozen=True, slots=True)
class Page:
    """Records in order, without their input, and whether more follow."""

    records: Sequence[Record]
    has_more: bool
