"""Log-probabilities on their way to the client: each goes out together with the text of its token.

Text is held back at two places, until a character is complete (`app.text.detokenizer`) and until it is certain that no
stop string has begun (`app.text.stop`). The scores of a token wait as long as its text does: none is lost or repeated,
and what a stop string cuts away has none.
"""

from collections import deque
from dataclasses import dataclass

from app.text.detokenizer import DetokenizerFactory
from workers.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of the answer or the prompt. ``offset``: where it begins in the choice's text, in characters.

    ``scores`` is None for the first token of a prompt, before which there is nothing that could make it likely.
    """

    id: int
    scores: TokenLogprobs | None
    offset: int


@dataclass(slots=True)
class _Held:
    token: ScoredToken
    # Where its text ends, once that is known.
    end: int | None


class TokenTrail:
    """The tokens of one choice whose text is not certain yet; ``begin`` characters stand before the first."""

    __slots__ = ("_begin", "_characters", "_held")

    def __init__(self, begin: int = 0) -> None:
        self._begin = begin
        self._characters = 0
        self._held: deque[_Held] = deque()

    def push(self, token_id: int, scores: TokenLogprobs, text: str, holding: bool) -> None:
        """Take the next token: the detokenizer answered it with ``text``; ``holding`` if it keeps some bytes back."""
        before = self._characters
        self._extend(text)
        token = ScoredToken(token_id, scores, self._begin + before)
        if not holding:
            # Whatever was open until now belongs to this text, or has none.
            self._close(self._characters)
        self._held.append(_Held(token, None if holding else self._characters))

    def flush(self, text: str) -> None:
        """The detokenizer's last word."""
        self._extend(text)
        self._close(self._characters)

    def release(self, characters: int) -> list[ScoredToken]:
        """Return the tokens whose text lies within the first ``characters`` of the choice; they are now certain."""
        held, certain = self._held, []
        while held and held[0].end is not None and held[0].end <= characters:
            certain.append(held.popleft().token)
        return certain

    def cut(self, characters: int) -> list[ScoredToken]:
        """A stop string ended the text at ``characters``: return the rest of the tokens that have a part in it."""
        certain = self.release(characters)
        limit = self._begin + characters
        certain += [each.token for each in self._held if each.token.offset < limit]
        self._held.clear()
        return certain

    def _extend(self, text: str) -> None:
        if text:
            # A character that was begun by tokens before is the first of the new ones.
            self._close(self._characters + 1)
            self._characters += len(text)

    def _close(self, end: int) -> None:
        for each in reversed(self._held):
            if each.end is not None:
                break
            each.end = end


class TokenNames:
    """How tokens are written in an answer; each is worked out once."""

    def __init__(self, detokenizers: DetokenizerFactory) -> None:
        self._detokenizers = detokenizers
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token_id: int) -> tuple[str, list[int] | None]:
        """Return the token's text, and its bytes where the tokenizer tells them.

        A token that is only a part of a character has no text: it is written as OpenAI does, ``bytes:\\xe4\\xbd``.
        """
        known = self._known.get(token_id)
        if known is None:
            raw = self._detokenizers.token_bytes(token_id)
            known = self._known[token_id] = ("\ufffd", None) if raw is None else (_written(raw), list(raw))
        return known


def _written(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
