"""Prompts for the loads, no two alike, and the count of tokens in a text."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

# fmt: off
_KINDS = ("quiet", "brave", "golden", "ancient", "tiny", "restless", "silver", "curious", "hidden", "lonely", "gentle")
_HEROES = ("lighthouse", "gardener", "clockmaker", "library", "dragon", "sailor", "orchard", "robot", "river")
_PLACES = ("Lisbon", "Kyoto", "Bergen", "Cusco", "Tunis", "Riga", "Hanoi", "Galway", "Quito", "Oslo", "Cairo", "Perth")
_WORDS = (
    "the", "a", "of", "and", "to", "in", "was", "for", "with", "this", "which", "were", "had", "not", "but", "all",
    "water", "city", "market", "house", "road", "field", "winter", "summer", "morning", "evening", "letter", "story",
    "people", "children", "farmer", "captain", "doctor", "king", "village", "engine", "paper", "music", "silver",
    "walked", "found", "opened", "carried", "turned", "built", "made", "wrote", "asked", "told", "looked", "returned",
    "old", "new", "long", "small", "great", "early", "late", "bright", "dark", "warm", "cold", "strange", "slow",
)
# fmt: on
_QUESTIONS = ("What is this text about?", "Name one place in this text.")


class TokenCounter:
    """Counts tokens the way the benchmarked model does."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))

    def __call__(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def without_text(self) -> list[int]:
        """Return the special tokens, which show no text when a model produces them."""
        return [token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special]


def short_prompts(seed: int) -> Iterator[str]:
    """Yield prompts without end, each different from its first words on: about 60 tokens with the chat template.

    They ask for more text than a run takes, so that servers which cannot ignore the end of text do not stop early.
    """
    combinations = list(itertools.product(_KINDS, _HEROES, _PLACES))
    random.Random(seed).shuffle(combinations)
    for number, (kind, hero, place) in enumerate(itertools.cycle(combinations), 1):
        yield (
            f"{kind.capitalize()} {hero} in {place}, part {number}. Write a very long and detailed story about it, "
            "in many paragraphs, with many characters."
        )


def long_prefix(count: TokenCounter, tokens: int, seed: int) -> str:
    """Return made-up text of ``tokens`` tokens (one more at most), different for each seed from its first words on."""
    choose = random.Random(seed)
    sentences = [f"Chapter {seed}."]
    # By the sentence first, by the word at the end: counting takes time that grows with the text.
    have = count(sentences[0])
    while have < tokens - 20:
        sentence = " ".join(choose.choices(_WORDS, k=choose.randint(7, 12))).capitalize() + "."
        sentences.append(sentence)
        have += count(" " + sentence)
    text = " ".join(sentences)
    while count(text) < tokens:
        text += f" {choose.choice(_WORDS)}"
    return text


def question(prefix: str, number: int) -> str:
    """Return ``prefix`` with one or the other question behind it."""
    return f"{prefix}\n\n{_QUESTIONS[number % len(_QUESTIONS)]}"
