"""Log-probabilities in the shapes of OpenAI's two APIs, and those of the prompt in vLLM's."""

from collections.abc import Sequence
from typing import Any

import orjson

from app.text.card import Model
from app.text.offload import off_hub_if_large
from app.text.scores import ScoredToken, TokenNames
from workers.messages import TokenLogprobs

# JSON has no infinity; OpenAI's word for "impossible".
LEAST = -9999.0


def chat_logprobs(names: TokenNames, tokens: Sequence[ScoredToken], top: int) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat choice, with ``top`` alternatives for each token."""
    content = []
    for token in tokens:
        scores = token.scores or TokenLogprobs(LEAST)
        alternatives = [_chat_entry(names, token_id, logprob) for token_id, logprob in scores.top[:top]]
        content.append({**_chat_entry(names, token.id, scores.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _chat_entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = names(token_id)
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": raw}


def completion_logprobs(names: TokenNames, tokens: Sequence[ScoredToken], top: int) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion: parallel lists; null for the first token of an echoed prompt.

    Each of ``top_logprobs`` holds the token itself beside the ``top`` most likely ones.
    """
    return {
        "tokens": [names(token.id)[0] for token in tokens],
        "token_logprobs": [max(token.scores.logprob, LEAST) if token.scores else None for token in tokens],
        "top_logprobs": [_alternatives(names, token, top) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _alternatives(names: TokenNames, token: ScoredToken, top: int) -> dict[str, float] | None:
    if token.scores is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in (*token.scores.top[:top], (token.id, token.scores.logprob)):
        # Two tokens may be written alike; the more likely one comes first.
        found.setdefault(names(token_id)[0], max(logprob, LEAST))
    return found


class PromptScores:
    """The ``prompt_logprobs`` of choices, as ready JSON: made once for all choices of a prompt.

    A list with one entry for each token: null for the first, else an object from token ids (the ``top`` most likely,
    and the prompt's own) to ``{"logprob", "rank", "decoded_token"}``; rank 1 is the most likely, and null is said of a
    prompt's token that is not among the ``top``.
    """

    def __init__(self, model: Model, top: int) -> None:
        self._names = model.token_names
        self._top = top
        self._last: tuple[Sequence[ScoredToken], orjson.Fragment] | None = None

    def __call__(self, tokens: Sequence[ScoredToken]) -> orjson.Fragment:
        if self._last is None or self._last[0] is not tokens:
            size = len(tokens) * (self._top + 1) * 64
            self._last = tokens, orjson.Fragment(off_hub_if_large(size, self._encode, tokens))
        return self._last[1]

    def _encode(self, tokens: Sequence[ScoredToken]) -> bytes:
        return orjson.dumps([self._entry(token) for token in tokens])

    def _entry(self, token: ScoredToken) -> dict[str, Any] | None:
        if token.scores is None:
            return None
        ranked = [(*pair, rank) for rank, pair in enumerate(token.scores.top[: self._top], 1)]
        if all(token_id != token.id for token_id, _, _ in ranked):
            ranked.append((token.id, token.scores.logprob, None))  # type: ignore[arg-type]
        return {
            str(token_id): {
                "logprob": max(logprob, LEAST),
                "rank": rank,
                "decoded_token": self._names(token_id)[0],
            }
            for token_id, logprob, rank in ranked
        }
