"""The ids that clients see: letters and digits that cannot be mistaken for each other."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import count

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# More bits than the longest id holds, so that each letter is as likely as the others.
_BYTES = 24


@dataclass(frozen=True, slots=True)
class IdShape:
    """What a kind of id looks like: ``prefix``, and as many ``letters`` behind it (22 at most)."""

    prefix: str
    letters: int = 22

    def new(self) -> str:
        """Return a fresh id, which nobody can guess."""
        return self._written(os.urandom(_BYTES))

    def following(self, seed: str) -> Iterator[str]:
        """Yield ids that follow from ``seed``: the same ones whenever they are asked for."""
        for place in count():
            yield self._written(sha256(f"{seed}/{place}".encode()).digest())

    def _written(self, number: bytes) -> str:
        rest = int.from_bytes(number)
        letters = []
        for _ in range(self.letters):
            rest, place = divmod(rest, len(_ALPHABET))
            letters.append(_ALPHABET[place])
        return self.prefix + "".join(letters)


def new_id(prefix: str) -> str:
    """Return a fresh id: the prefix and 22 letters."""
    return IdShape(prefix).new()
