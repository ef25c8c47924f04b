"""Grammars that hold generated text to a JSON schema, a regular expression or a context-free grammar.

llguidance computes, for each step, which tokens can still lead to a match. It needs no compilation worth the name, and
a matcher can be copied (for choices and beams) and led over tokens that exist already (for a job that is resumed).
"""

import json
import math
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from workers.engine.errors import GrammarError
from workers.messages import JSON_WHITE_SPACE, Grammar

CACHE_SIZE = 128
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": JSON_WHITE_SPACE}
# A schema with 5,000 properties takes seconds to compile; this many symbols take less than one. The parser's own state,
# which errors would show, is of no use to a client.
LIMITS = LLParserLimits(max_grammar_size=20_000, verbose_errors=False)
# "A multiple of m" is an automaton with m states, or, where schemas are combined, as many as the least common multiple.
# It is made in one go, and counted by no limit: a hundred thousand states take a second, a hundred million for ever.
MAX_MULTIPLE = 20_000
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.0-9eE]{1,400})')
_COMBINES = re.compile(r'"(allOf|anyOf|oneOf|\$ref|\$dynamicRef|if|not)"')
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
# Left to itself, llguidance cuts a text that is certain into tokens at once. Where such a text holds the name of a
# special token (an enum with "<think>"), it gets that token, which its own parser then refuses.
_OPTIONS = '%llguidance {"no_forcing": true}'
# How llguidance writes where a fault is, and how it begins to show it.
_PLACE = re.compile(r"at (\d+)\(\d+\): ")
_EXCERPT = re.compile(r"\n +\d+ \| ")


class GrammarCompiler:
    """Makes matchers for one tokenizer. Used from one thread at a time; it releases the GIL while it works.

    ``tokenizer`` is a fast transformers tokenizer, ``vocab_size`` the rows of the logits, ``stop_token_ids`` the tokens
    that a finished match allows.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop = stop_token_ids
        self._wrapped: LLTokenizer | None = None
        self._cache: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def warm_up(self) -> LLTokenizer:
        """Build the tokenizer's trie now (about a second for a large vocabulary) rather than at the first request."""
        if self._wrapped is None:
            self._wrapped = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._stop)
        return self._wrapped

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Return a matcher at the beginning of ``grammar``. Raises `GrammarError`."""
        known = self._cache.get(grammar)
        if known is None:
            known = self._make(grammar)
            self._cache[grammar] = known
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return known.deep_copy()

    def _make(self, grammar: Grammar) -> LLMatcher:
        _check_multiples(grammar)
        try:
            source = LLMatcher.grammar_from_lark(f"{_as_lark(grammar)}\n{_OPTIONS}")
            matcher = LLMatcher(self.warm_up(), source, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise _refused(str(error), grammar) from error
        if not matcher.is_error():
            # The first mask is by far the dearest, and copies share what was made for it. It also shows a grammar that
            # matches nothing.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(matcher.get_error(), grammar)
        return matcher


def allowed_tokens(matcher: LLMatcher, vocab_size: int) -> torch.Tensor:
    """Return bool ``[vocab_size]``: the tokens that may come next. Raises `GrammarError` from a matcher in error."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    if matcher.is_error():
        raise GrammarError(_one_line(matcher.get_error()))
    flags = np.unpackbits(bits, bitorder="little")[:vocab_size]
    mask = np.zeros(vocab_size, dtype=bool)
    mask[: len(flags)] = flags
    return torch.from_numpy(mask)


def _as_lark(grammar: Grammar) -> str:
    """Raises `ValueError` for what is none."""
    if grammar.kind == "json_schema":
        (read,) = json.loads(LLMatcher.grammar_from_json_schema(grammar.source, defaults=JSON_OPTIONS))["grammars"]
        return f"start: %json {json.dumps(read['json_schema'])}"
    if grammar.kind == "regex":
        (read,) = json.loads(LLMatcher.grammar_from_regex(grammar.source))["grammars"]
        return str(read["lark_grammar"])
    return grammar.source


def _refused(text: str, grammar: Grammar) -> GrammarError:
    """Take llguidance's word apart: the place, the reason, and behind it the source, which need not be repeated."""
    place = _PLACE.match(text)
    if place is None:
        return GrammarError(_one_line(text))
    reason = _EXCERPT.split(text[place.end() :], maxsplit=1)[0]
    # Of the other kinds, the lines are ours.
    return GrammarError(_one_line(reason), int(place[1]) if grammar.kind == "lark" else 0)


def _check_multiples(grammar: Grammar) -> None:
    """Raise `GrammarError` for a ``multipleOf`` that would take for ever; a Lark grammar can hold schemas, too."""
    if grammar.kind == "regex":
        return
    source = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), grammar.source)
    numbers = [_significant(found[1]) for found in _MULTIPLE.finditer(source)]
    states = math.lcm(*numbers) if _COMBINES.search(source) else max(numbers, default=1)
    if states > MAX_MULTIPLE:
        raise GrammarError(f"multipleOf takes more than {MAX_MULTIPLE} states")


def _significant(number: str) -> int:
    """Return the digits of a JSON number without its zeros at either end: 0.05 and 500 both count to 5."""
    digits = re.split("[eE]", number)[0].replace(".", "").strip("+-0")
    # Three hundred digits are as many too many as six.
    return int(digits[:9]) if digits.isdigit() else 1


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
