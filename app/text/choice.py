"""One choice of an answer as it grows: tokens in, the text out that is certain."""

import math
from collections.abc import Sequence
from typing import Literal

from app.text.detokenizer import Detokenizer
from app.text.scores import ScoredToken, TokenTrail
from app.text.stop import StopMatcher, StopStrings
from workers.messages import Output, TokenLogprobs

FinishReason = Literal["stop", "length"]


class ChoiceText:
    """The growing text of one choice: detokenizer, stop strings, count of tokens, scores if ``trail`` is given."""

    __slots__ = (
        "_detokenizer",
        "_logprobs",
        "_matcher",
        "_min_tokens",
        "_released",
        "_trail",
        "finish_reason",
        "scored",
        "tokens",
    )

    def __init__(
        self, detokenizer: Detokenizer, stops: StopStrings, min_tokens: int, trail: TokenTrail | None = None
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher: StopMatcher | None = stops.matcher() if stops else None
        self._min_tokens = min_tokens
        self._trail = trail
        # Characters that went out.
        self._released = 0
        self._logprobs = 0.0
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        # The tokens that became certain with the last `push`.
        self.scored: Sequence[ScoredToken] = ()

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice, if one did."""
        return None if self._matcher is None else self._matcher.matched

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the tokens up to now; without any, worse than all others."""
        return self._logprobs / self.tokens if self.tokens else -math.inf

    def push(self, output: Output) -> str:
        """Return the text that can go out; sets ``finish_reason`` when a stop string or the engine ended the choice.

        With scores, ``scored`` then holds the tokens that belong to it.
        """
        return self._released_with_scores(self._text(output))

    def cut(self) -> str:
        """End the choice where it is, as if so many tokens were all it might have; return what was held back."""
        self.finish_reason = "length"
        return self._released_with_scores(self._flush())

    def _released_with_scores(self, text: str) -> str:
        trail = self._trail
        if trail is not None:
            self._released += len(text)
            matched = self._matcher is not None and self._matcher.matched is not None
            self.scored = trail.cut(self._released) if matched else trail.release(self._released)
        return text

    def _text(self, output: Output) -> str:
        ids = output.ids
        # The stop token is the last of the ids and no part of the text.
        visible = ids[:-1] if output.stop_token_id is not None and ids else ids
        if self._matcher is None and self._trail is None:
            self.tokens += len(ids)
            text = self._detokenizer.push(visible) if visible else ""
        else:
            text = self._push_one_by_one(visible, output.logprobs)
            if self.finish_reason is not None:
                return text
            self.tokens += len(ids) - len(visible)
            if self._trail is not None and len(ids) > len(visible):
                self._logprobs += output.logprobs[-1].logprob
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            text += self._flush()
        return text

    def _push_one_by_one(self, ids: Sequence[int], scores: Sequence[TokenLogprobs]) -> str:
        """The usage ends at the very token that completed the stop string, so each is looked at alone."""
        matcher, trail = self._matcher, self._trail
        text = ""
        for place, token_id in enumerate(ids):
            self.tokens += 1
            new = self._detokenizer.push((token_id,))
            if trail is not None:
                trail.push(token_id, scores[place], new, self._detokenizer.holding)
                self._logprobs += scores[place].logprob
            if matcher is None or self.tokens < self._min_tokens:
                text += new
                continue
            text += matcher.push(new)
            if matcher.matched is not None:
                self.finish_reason = "stop"
                break
        return text

    def _flush(self) -> str:
        rest = self._detokenizer.flush()
        if self._trail is not None:
            self._trail.flush(rest)
        matcher = self._matcher
        if matcher is None:
            return rest
        text = matcher.push(rest)
        if matcher.matched is not None:
            self.finish_reason = "stop"
            return text
        return text + matcher.flush()
