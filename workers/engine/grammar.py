"""Grammars that hold generated text to a JSON schema, a regular expression or a context-free grammar.

llguidance computes, for each step, which tokens can still lead to a match. It needs no compilation worth the name, and
a matcher can be copied (for choices and beams) and led over tokens that exist already (for a job that is resumed).
"""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from workers.engine.errors import GrammarError
from workers.messages import Grammar

CACHE_SIZE = 128
# White space in JSON: none, a space, or a line end with its indentation. Any more would let a small model, at every
# place where JSON allows it, go on with white space until its tokens run out.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"\n {0,24}| "}


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
        try:
            if grammar.kind == "json_schema":
                source = LLMatcher.grammar_from_json_schema(grammar.source, defaults=JSON_OPTIONS)
            elif grammar.kind == "regex":
                source = LLMatcher.grammar_from_regex(grammar.source)
            else:
                source = LLMatcher.grammar_from_lark(grammar.source)
            matcher = LLMatcher(self.warm_up(), source, log_level=0)
        except ValueError as error:
            raise GrammarError(_one_line(str(error))) from error
        if matcher.is_error():
            raise GrammarError(_one_line(matcher.get_error()))
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


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
