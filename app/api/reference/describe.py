"""What a route says about itself, beside what its models say: joined to the view function by `describes`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the URL; ``schema`` is its JSON schema, ``place`` "query" or "path"."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    place: str = "query"


PAGE = (
    Parameter("limit", "how many, 1 to 100", {"type": "integer", "minimum": 1, "maximum": 100}),
    Parameter("order", "by the time they were made", {"enum": ["asc", "desc"]}),
    Parameter("after", "the id of the last one of the page before"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One route. The summary is the first line of the view's docstring.

    ``request``, ``answer``: models of the bodies. ``events``: the type of the JSON in each event, for a route that can
    stream. ``others``: models of answers with other statuses. ``media_type``: of an answer that is no JSON.
    ``example``: a request that works with every model.
    """

    tag: str
    request: type[BaseModel] | None = None
    answer: Any = None
    events: Any = None
    status: int = 200
    others: Mapping[int, Any] = field(default_factory=dict)
    parameters: Sequence[Parameter] = ()
    media_type: str = "application/json"
    example: Mapping[str, Any] | None = None


_ATTRIBUTE = "__tailrace_description__"


def describes(**values: Any) -> Callable[[F], F]:
    """Give a view function its `Description`; to be written below the decorator of the route."""
    description = Description(**values)

    def attach(view: F) -> F:
        setattr(view, _ATTRIBUTE, description)
        return view

    return attach


def description_of(view: Callable[..., Any]) -> Description | None:
    """Return what a view function says about itself, or None."""
    return getattr(view, _ATTRIBUTE, None)
