"""What the READMEs say is so: their flags exist, and both show the same examples."""

import re
from pathlib import Path

import pytest

from config import cli
from config.settings import Settings
from config.sources import ROOT
from tests.readme import examples

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
_OF_OTHER_PROGRAMS = {"help"}


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_flag_that_is_named_exists(path: Path):
    named = set(re.findall(r"--([a-z0-9_]{3,})", path.read_text(encoding="utf-8"))) - _OF_OTHER_PROGRAMS
    assert named
    assert named <= set(Settings.model_fields)
    assert set(re.findall(r"--(\w+)", cli._parser().format_help())) >= named


def test_both_languages_show_the_same_examples():
    english, chinese = map(examples, READMES)
    assert english == chinese
    assert len(english) == 9


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_file_that_is_linked_exists(path: Path):
    links = re.findall(r"\]\(([\w./-]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def _fields(text: str) -> set[str]:
    """The names in the first column of the tables of request fields."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_parameter_table_has_every_field_that_shapes_an_answer(path: Path):
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    both = api.partition("### Both")[2].partition("### POST")[0]
    told = _fields(path.read_text(encoding="utf-8"))
    assert "temperature" in _fields(both)
    assert _fields(both) - {"model"} <= told
    assert {"echo", "suffix", "logprobs", "top_logprobs", "max_tokens", "dimensions", "tools", "store"} <= told
