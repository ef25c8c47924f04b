"""Stop strings end the text exactly where they begin, however the text was cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.text.stop import StopStrings

short = st.text(alphabet="ab你", max_size=30)
stops = st.lists(st.text(alphabet="ab你", min_size=1, max_size=4), min_size=1, max_size=4)


def run(strings: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    matcher = StopStrings(strings).matcher()
    out = [matcher.push(piece) for piece in pieces]
    if matcher.matched is None:
        out.append(matcher.flush())
    return out, matcher.matched


def expected(strings: list[str], text: str) -> tuple[str, str | None]:
    """Read the text character by character; the first string to be complete ends it, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops, st.lists(short, max_size=8))
def test_ends_where_the_first_complete_stop_string_begins(strings: list[str], pieces: list[str]) -> None:
    out, matched = run(strings, pieces)
    assert ("".join(out), matched) == expected(strings, "".join(pieces))


@given(stops, short)
def test_how_the_text_was_cut_does_not_matter(strings: list[str], text: str) -> None:
    whole, by_character = run(strings, [text]), run(strings, list(text))
    assert "".join(whole[0]) == "".join(by_character[0])
    assert whole[1] == by_character[1]


@given(stops, st.lists(short, max_size=8))
def test_nothing_of_a_stop_string_gets_out(strings: list[str], pieces: list[str]) -> None:
    out, matched = run(strings, pieces)
    sent = "".join(out)
    assert all(string not in sent for string in strings)
    if matched is not None:
        assert "".join(pieces).startswith(sent + matched)


@given(stops, st.lists(short, max_size=8))
def test_no_more_is_held_back_than_may_still_become_a_stop_string(strings: list[str], pieces: list[str]) -> None:
    matcher = StopStrings(strings).matcher()
    seen = sent = ""
    for piece in pieces:
        seen += piece
        sent += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = seen[len(sent) :]
        assert any(string.startswith(held) for string in strings)


@pytest.mark.parametrize(
    ("strings", "pieces", "text"),
    [
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb"),
        (["</s>"], ["x<", "/", "s", "x</s", ">y"], "x</sx"),
        (["aab"], ["aa", "ab"], "a"),
        (["北京。"], ["首都是北", "京", "。好"], "首都是"),
    ],
)
def test_examples(strings: list[str], pieces: list[str], text: str) -> None:
    assert "".join(run(strings, pieces)[0]) == text


def test_a_long_hostile_stop_string_costs_linear_time() -> None:
    matcher = StopStrings(["a" * 1023 + "b"]).matcher()
    sent = "".join(matcher.push("a" * 50) for _ in range(2000))
    assert len(sent) == 100_000 - 1023
