"""Pieces of text come out whole, soon, and joined together are the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.text.detokenizer import ByteDetokenizer, Detokenizer, DetokenizerFactory, WindowDetokenizer
from tests.app.tiny import CORPUS, IM_END, ids_of, tokenizer

texts = st.text(
    alphabet=st.one_of(st.sampled_from("你好世界天气 aeé😀👍🏽🇨🇳\n"), st.characters(codec="utf-8")), max_size=40
)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=20)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 has it: words begin with a low line, bytes stand in for unknown characters."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "你", "▁ab", "ab"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def metaspace_tokenizer() -> Tokenizer:
    """A family for which there is no table of bytes."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    made.train_from_iterator(CORPUS, trainer)
    return made


BYTE_LEVEL = DetokenizerFactory(tokenizer())
BYTE_FALLBACK = DetokenizerFactory(byte_fallback_tokenizer())
METASPACE = DetokenizerFactory(metaspace_tokenizer())


def pieces(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Feed ids in groups of the given sizes, over and over."""
    out, place, turn = [], 0, 0
    while place < len(ids):
        size = cuts[turn % len(cuts)]
        out.append(detokenizer.push(ids[place : place + size]))
        place, turn = place + size, turn + 1
    return [*out, detokenizer.flush()]


def test_each_family_is_recognised() -> None:
    assert isinstance(BYTE_LEVEL.start(), ByteDetokenizer)
    assert isinstance(BYTE_FALLBACK.start(), ByteDetokenizer)
    assert isinstance(METASPACE.start(), WindowDetokenizer)


@given(texts, sizes)
def test_pieces_are_whole_characters_and_join_to_the_text(text: str, cuts: list[int]) -> None:
    out = pieces(BYTE_LEVEL.start(), ids_of(text), cuts)

    assert "".join(out) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in out)


@given(texts, sizes)
def test_byte_fallback_pieces_join_to_the_text(text: str, cuts: list[int]) -> None:
    made = byte_fallback_tokenizer()
    ids = made.encode(text).ids
    out = pieces(BYTE_FALLBACK.start(), ids, cuts)

    assert "".join(out) == made.decode(ids)
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in out)


@given(st.lists(st.integers(0, tokenizer().get_vocab_size() - 1), max_size=60), sizes)
def test_any_tokens_give_what_the_library_decodes_at_once(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL.start(), ids, cuts)) == tokenizer().decode(ids)


@given(st.lists(st.integers(0, tokenizer().get_vocab_size() - 1), max_size=60), sizes)
def test_pieces_do_not_depend_on_how_tokens_come(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL.start(), ids, cuts)) == "".join(pieces(BYTE_LEVEL.start(), ids, [1]))


@settings(max_examples=50)
@given(st.text(alphabet="你好世界天气 abc. The capital", max_size=40), sizes)
def test_other_families_join_to_the_text(text: str, cuts: list[int]) -> None:
    made = metaspace_tokenizer_cached
    ids = made.encode(text).ids
    assert "".join(pieces(METASPACE.start(), ids, cuts)) == made.decode(ids)


metaspace_tokenizer_cached = METASPACE._tokenizer


@given(texts)
def test_the_window_agrees_with_the_table_of_bytes(text: str) -> None:
    window = WindowDetokenizer(tokenizer(), frozenset())
    assert "".join(pieces(window, ids_of(text), [1])) == text


def test_every_character_comes_with_its_last_token() -> None:
    detokenizer = BYTE_LEVEL.start()
    for character in "饕😀":
        ids = ids_of(character)
        assert len(ids) >= 2
        assert [detokenizer.push([token]) for token in ids] == [""] * (len(ids) - 1) + [character]


def test_an_unfinished_character_is_shown_as_broken_only_at_the_end() -> None:
    detokenizer = BYTE_LEVEL.start()
    assert detokenizer.push([*ids_of("ok"), *ids_of("😀")[:-1]]) == "ok"
    assert detokenizer.flush() == "\ufffd"


def test_a_window_does_not_hold_back_for_ever() -> None:
    detokenizer = WindowDetokenizer(tokenizer(), frozenset())
    broken = ids_of("😀")[:1]
    shown = "".join(detokenizer.push(broken) for _ in range(20))
    assert len(shown) >= 15


@given(text=texts, cut=st.integers(0, 20))
def test_a_window_shows_the_special_tokens_that_are_asked_for(text: str, cut: int) -> None:
    special = BYTE_LEVEL.special
    shown, hidden = sorted(special)[:2]
    window = WindowDetokenizer(tokenizer(), special, visible=frozenset([shown]))
    first, rest = ids_of(text[:cut]), ids_of(text[cut:])
    name = tokenizer().id_to_token(shown)
    assert window.push([*first, hidden, shown, *rest]) + window.flush() == f"{text[:cut]}{name}{text[cut:]}"


@pytest.mark.parametrize("factory", [BYTE_LEVEL, BYTE_FALLBACK, METASPACE])
def test_unknown_ids_have_no_text(factory: DetokenizerFactory) -> None:
    detokenizer = factory.start()
    assert detokenizer.push([1_000_000]) + detokenizer.flush() == ""


def test_special_tokens_have_no_text_and_other_added_tokens_are_written_as_they_are() -> None:
    made = Tokenizer.from_str(tokenizer().to_str())
    made.add_tokens([AddedToken("<tool 你>", special=False)])
    ids = [*ids_of("a"), IM_END, made.token_to_id("<tool 你>"), *ids_of("b")]
    assert DetokenizerFactory(made).start().push(ids) == "a<tool 你>b" == made.decode(ids)
