"""The parameters of a URL, and lists that clients read a page at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flask import g, request

from app.api.service import service
from app.errors import invalid

MAX_PAGE = 100
_DEFAULT_PAGE = "20"

Order = Literal["asc", "desc"]


def query(*known: str) -> dict[str, str]:
    """Return the URL's parameters of these names; others are noted as warnings, or refused with ``--strict``."""
    found = {}
    unknown = []
    for name, value in request.args.items():
        if name in known or name.removesuffix("[]") in known or name.partition("[")[0] + "[" in known:
            found[name] = value
        else:
            unknown.append(name[:64])
    if unknown and service().settings.strict:
        raise invalid(f"Unknown parameter: {unknown[0]}.", unknown[0])
    g.warnings = [f"Unknown parameter, ignored: {name}" for name in unknown]
    return found


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which page of a list is asked for: ``limit`` entries in this order, behind the one whose id is ``after``."""

    limit: int
    order: Order
    after: str | None

    @classmethod
    def read(cls, given: Mapping[str, str], order: Order) -> "PageQuery":
        """Return what the URL's parameters ask for; ``order`` is the default. Raises `ApiError` 400."""
        text = given.get("limit", _DEFAULT_PAGE)
        if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_PAGE):
            raise invalid(f"limit must be a number from 1 to {MAX_PAGE}.", "limit")
        match given.get("order", order):
            case "asc" | "desc" as asked:
                return cls(int(text), asked, given.get("after"))
        raise invalid('order must be "asc" or "desc".', "order")

    def page(self, entries: Sequence[Mapping[str, Any]], noun: str) -> dict[str, Any]:
        """Return the page of ``entries``, which come oldest first. Raises `ApiError` 400: ``after`` is none of them."""
        ordered = entries if self.order == "asc" else entries[::-1]
        if self.after is not None:
            places = [place for place, entry in enumerate(ordered) if entry["id"] == self.after]
            if not places:
                raise invalid(f"after is not the id of one of the {noun}.", "after")
            ordered = ordered[places[0] + 1 :]
        return page_body(ordered[: self.limit], len(ordered) > self.limit)


def page_body(entries: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page as OpenAI's clients expect it."""
    return {
        "object": "list",
        "data": entries,
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
        "has_more": has_more,
    }
