"""Fill in the middle: the model writes what belongs between a prompt and its suffix (Bavarian et al. 2022).

The order is prefix, suffix, middle, with the special tokens that the model was trained with.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

# Written by: Qwen, CodeGemma; StarCoder, SmolLM3; Granite; CodeLlama (two spellings); DeepSeek.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
# What such models put behind a middle that is complete, beside their ordinary end of text.
_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<fim_pad>", "<|file_sep|>", "<file_sep>", "<|file_separator|>")
_LLAMA_ENDS = ("▁<EOT>", "<EOT>")


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """The three marks, and the tokens that end the middle."""

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """Return the tokens that make the model write what stands between ``before`` and ``after``."""
        return [self.prefix, *before, self.suffix, *after, self.middle]


def find_infill_tokens(tokenizer: Tokenizer) -> InfillTokens | None:
    """Return the marks among the tokenizer's added tokens; None for a model that was not trained with any."""
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    for family in _FAMILIES:
        if all(mark in added for mark in family):
            prefix, suffix, middle = (added[mark] for mark in family)
            ends = [added[end] for end in (*_ENDS, *_LLAMA_ENDS) if end in added]
            return InfillTokens(prefix, suffix, middle, tuple(sorted({prefix, suffix, middle, *ends})))
    return None
