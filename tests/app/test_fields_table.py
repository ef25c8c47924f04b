"""docs/api.md has every field of every request, and says of each what the code does with it."""

import re
from pathlib import Path

import pytest

from app.api import fields
from app.api.schemas import ApiRequest, ChatRequest, CompletionRequest, EmbeddingRequest, GenerationRequest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    """Field and status of each row of the section."""
    section = DOCUMENT.partition(f"### {heading}\n")[2]
    assert section, heading
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .*\|$", section, flags=re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a field is there twice"
    return dict(rows)


@pytest.mark.parametrize(
    ("headings", "schema"),
    [
        (("POST /v1/chat/completions", "Both"), ChatRequest),
        (("POST /v1/completions", "Both"), CompletionRequest),
        (("POST /v1/embeddings",), EmbeddingRequest),
        (("POST /v1/chat/completions", "POST /v1/completions", "Both"), GenerationRequest),
    ],
)
def test_every_field_is_in_its_table(headings: tuple[str, ...], schema: type[ApiRequest]) -> None:
    documented = {field for heading in headings for field in table(heading)}
    known = set(schema.model_fields)
    assert known <= documented
    assert schema is GenerationRequest or documented == known
    assert {status for heading in headings for status in table(heading).values()} == {"done"}


def test_refused_and_harmless_fields_are_in_the_last_table() -> None:
    everywhere = table("Everywhere")
    done = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    assert {name for name, status in everywhere.items() if status == "harmless"} == fields._HARMLESS
    assert {name for name, status in everywhere.items() if status == "refused"} == set(fields._NEUTRAL) - done
    assert set(everywhere.values()) == {"refused", "harmless"}
