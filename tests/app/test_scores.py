"""Scores travel with their token's text through detokenizer and stop strings, whatever the tokens and the cuts."""

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from app.text.card import Model
from app.text.choice import ChoiceText
from app.text.detokenizer import DetokenizerFactory
from app.text.prompts import echo_of
from app.text.scores import ScoredToken, TokenTrail
from app.text.stop import StopStrings
from tests.app.test_detokenizer import byte_fallback_tokenizer, metaspace_tokenizer
from tests.app.tiny import ids_of, tokenizer
from workers.messages import ModelCard, Output, TokenLogprobs

TOKENIZERS = {"bytes": tokenizer, "fallback": cache(byte_fallback_tokenizer), "window": cache(metaspace_tokenizer)}


def run(factory: DetokenizerFactory, ids: list[int], stop: list[str], cuts: list[int]) -> list[tuple[str, list[int]]]:
    """Return the pieces, each with the places of its tokens."""
    choice = ChoiceText(factory.start(), StopStrings(stop), 0, TokenTrail())
    pieces = []
    borders = [0, *sorted({cut for cut in cuts if 0 < cut < len(ids)}), len(ids)]
    for first, last in itertools.pairwise(borders):
        output = Output(
            id="x",
            ids=ids[first:last],
            logprobs=[TokenLogprobs(float(place)) for place in range(first, last)],
            finish_reason="length" if last == len(ids) else None,
        )
        text = choice.push(output)
        pieces.append((text, [place_of(token) for token in choice.scored]))
        if choice.finish_reason is not None:
            break
    return pieces


def place_of(token: ScoredToken) -> int:
    assert token.scores is not None
    return int(token.scores.logprob)


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_token_is_lost_or_repeated_and_cuts_change_nothing(family: str, data: st.DataObject) -> None:
    own = TOKENIZERS[family]()
    factory = DetokenizerFactory(own)
    ids = data.draw(st.lists(st.integers(0, own.get_vocab_size() - 1), min_size=1, max_size=20))
    cuts = data.draw(st.lists(st.integers(1, 20), max_size=10))
    stop = data.draw(st.lists(st.text("aeo 😀首", min_size=1, max_size=2), max_size=2))
    whole = run(factory, ids, stop, [])
    text, places = whole[0]
    assert places == list(range(len(places)))
    if not stop:
        assert len(places) == len(ids)
    pieces = run(factory, ids, stop, cuts)
    assert "".join(piece for piece, _ in pieces) == text
    assert [place for _, each in pieces for place in each] == places


@pytest.mark.parametrize("cuts", [[], list(range(1, 40))])
def test_a_character_of_several_tokens_comes_with_all_of_them(cuts: list[int]) -> None:
    ids = ids_of("a😀b")
    pieces = run(DetokenizerFactory(tokenizer()), ids, [], cuts)
    assert [place for _, each in pieces for place in each] == list(range(len(ids)))
    for text, places in pieces:
        assert bool(text) == bool(places)


def model_of(own: Tokenizer, bos: str | None) -> Model:
    return Model(
        ModelCard(
            id="m",
            names=[],
            tokenizer_path="",
            add_bos_token=bos is not None,
            chat_template=None,
            special_tokens={"bos_token": bos} if bos else {},
            stop_token_ids=[],
            eos_token_id=None,
            vocab_size=own.get_vocab_size(),
            hidden_size=8,
            max_model_len=1000,
            created=0,
            dtype="float32",
            device="cpu",
        ),
        own,
    )


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("text", ["Hello world", "首都 😀!", " lead", ""])
def test_an_echo_tells_where_each_token_begins(family: str, text: str) -> None:
    model = model_of(TOKENIZERS[family](), None)
    ids = model.encode(text, add_bos=True, param=None)
    echo = echo_of(model, text, ids)
    assert echo.text == text
    assert len(echo.offsets) == len(ids)
    assert echo.offsets == sorted(echo.offsets)
    for token_id, offset in zip(ids, echo.offsets, strict=True):
        written = model.token_names(token_id)[0]
        if written.startswith("bytes:") or family != "bytes":
            assert 0 <= offset <= len(text)
        else:
            assert text.startswith(written, offset)


def test_the_token_before_a_text_has_no_part_in_its_echo() -> None:
    model = model_of(tokenizer(), "<|im_start|>")
    ids = model.encode("Hello", add_bos=True, param=None)
    echo = echo_of(model, "Hello", ids)
    assert (echo.text, echo.offsets[:2]) == ("Hello", [0, 0])
    assert len(echo.offsets) == len(ids)


def test_behind_an_echo_the_first_word_keeps_its_space() -> None:
    own = byte_fallback_tokenizer()
    factory = DetokenizerFactory(own)
    ids = own.encode("Hello", add_special_tokens=False).ids
    alone, behind = factory.start(), factory.start(ids)
    assert behind.push(ids) + behind.flush() == " " + alone.push(ids) + alone.flush()
