"""Tokens to text, a few at a time, without ever showing a broken character.

A character may be spread over several tokens (Chinese and emoji mostly are). Text is given out only up to the last
complete character; a tail of bytes that may still become one is held back, never more than three bytes, and comes out
as U+FFFD only when it is certain that it can become nothing, or at the end.

For the two families of tokenizers that nearly all models use, tokens are byte strings, so decoding is exact and costs a
dictionary look-up per token: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM), and SentencePiece with byte fallback
(Llama 2, Mistral, Gemma). Any other decoder goes through `WindowDetokenizer`.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

# A character has at most four bytes, so four tokens that end in U+FFFD are no unfinished character.
_LONGEST_CHARACTER = 4
_REPLACEMENT = "\ufffd"
# So many tokens before a text decide how its first one is written.
_WINDOW = 8


class Detokenizer(Protocol):
    """The text of one choice as it grows. Special tokens have no text, unless they were asked for."""

    @property
    def holding(self) -> bool:
        """Whether a part of the last tokens' text is held back."""
        ...

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that ``ids`` complete; often "" for a part of a character."""
        ...

    def flush(self) -> str:
        """Return what is held back, now that no more tokens will come."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens are byte strings: ``piece(id)`` is the token's bytes."""

    __slots__ = ("_piece", "_strip", "_tail")

    def __init__(self, piece: Callable[[int], bytes], strip: int = 0) -> None:
        self._piece = piece
        self._strip = strip
        # Bytes that may still become a character.
        self._tail = b""

    @property
    def holding(self) -> bool:
        return bool(self._tail)

    def push(self, ids: Sequence[int]) -> str:
        piece = self._piece
        data = self._tail + (piece(ids[0]) if len(ids) == 1 else b"".join(map(piece, ids)))
        text, used = codecs.utf_8_decode(data, "replace")
        self._tail = data[used:]
        return self._without_lead(text) if self._strip and text else text

    def flush(self) -> str:
        text, self._tail = self._tail.decode(errors="replace"), b""
        return self._without_lead(text) if self._strip and text else text

    def _without_lead(self, text: str) -> str:
        """Drop the spaces that SentencePiece puts before the first word."""
        while self._strip and text.startswith(" "):
            text = text[1:]
            self._strip -= 1
        if text:
            self._strip = 0
        return text


class WindowDetokenizer:
    """For any decoder: decodes the newest tokens behind some context, and gives out what the context has not shown.

    Of the ``special`` tokens those in ``visible`` come out as they are written, the others not at all.
    """

    __slots__ = ("_context", "_new", "_special", "_tokenizer", "_visible")

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: frozenset[int],
        context: Sequence[int] = (),
        visible: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._visible = visible & special
        self._context = [token for token in context if token not in special]
        self._new: list[int] = []

    @property
    def holding(self) -> bool:
        return bool(self._new)

    def push(self, ids: Sequence[int]) -> str:
        pieces: list[str] = []
        for token in ids:
            if token in self._visible:
                # Nothing in the text before it waits for a token like this one.
                pieces += (self.flush(), self._tokenizer.id_to_token(token) or "")
            elif token not in self._special:
                self._new.append(token)
                pieces.append(self._take(final=False))
        return "".join(pieces)

    def flush(self) -> str:
        return self._take(final=True) if self._new else ""

    def _take(self, final: bool) -> str:
        known = self._tokenizer.decode(self._context) if self._context else ""
        text = self._tokenizer.decode(self._context + self._new)
        unfinished = text.endswith(_REPLACEMENT) and len(self._new) < _LONGEST_CHARACTER
        if (unfinished and not final) or len(text) <= len(known):
            return ""
        self._context, self._new = self._new, []
        return text[len(known) :]


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer; what they share (special ids, bytes of each token) is kept here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._bytes: dict[int, bytes] = {}
        self._strip = 0
        decoder = json.loads(tokenizer.to_str()).get("decoder")
        self._to_bytes = self._choose(_flatten(decoder))

    def start(self, behind: Sequence[int] = (), visible: frozenset[int] = frozenset()) -> Detokenizer:
        """Return a detokenizer for a new choice, whose text is shown right behind that of the tokens ``behind``.

        Of the special tokens, only those in ``visible`` have a text.
        """
        if self._to_bytes is None:
            return WindowDetokenizer(self._tokenizer, self.special, behind[-_WINDOW:], visible)
        return ByteDetokenizer(self._shown(visible) if visible else self._piece, 0 if behind else self._strip)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of one token by itself, special tokens as they are written; None if nobody can tell."""
        if token_id in self.special:
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        if self._to_bytes is not None:
            return self._piece(token_id)
        text = self._tokenizer.decode([token_id])
        return None if _REPLACEMENT in text else text.encode()

    def _shown(self, visible: frozenset[int]) -> Callable[[int], bytes]:
        written = {token: (self._tokenizer.id_to_token(token) or "").encode() for token in visible & self.special}

        def piece(token_id: int) -> bytes:
            own = written.get(token_id)
            return self._piece(token_id) if own is None else own

        return piece

    def _piece(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            assert self._to_bytes is not None
            # An id behind the vocabulary (padding of the embedding matrix) has no text.
            token = None if token_id in self.special else self._tokenizer.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._to_bytes(token)
        return known

    def _choose(self, decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
        kinds = [decoder["type"] for decoder in decoders]
        if kinds == ["ByteLevel"]:
            return _byte_level_bytes
        if "ByteFallback" not in kinds or len(set(kinds)) != len(kinds):
            return None
        for decoder in decoders:
            match decoder:
                case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                    continue
                case {"type": "ByteFallback" | "Fuse"}:
                    continue
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                    self._strip = start
                case _:
                    return None
        if "Strip" in kinds and "Fuse" not in kinds[: kinds.index("Strip")]:
            # Without the fusion before it, the space of every token would be stripped.
            return None
        return _byte_fallback_bytes if "Replace" in kinds else _byte_fallback_bytes_as_written


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [inner for each in decoder["decoders"] for inner in _flatten(each)]


def _byte_level_table() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2, Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        # An added token is written as it is, not in the byte alphabet.
        return token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    return _byte_fallback_bytes_as_written(token.replace("▁", " "))


def _byte_fallback_bytes_as_written(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode()
