"""Each harness holds for its seeds and for some thousand mutations of them; ``make fuzz`` goes on from there."""

import random

import pytest

from tests.fuzz.harnesses import HARNESSES
from tests.fuzz.seeds import seeds

RUNS = 3_000
PARTS = [b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"<", b">", b"</", b"\xff", b"\x00", b"\n", b"\r", b"1e999", b","]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut, repeat, overwrite or insert at a few places."""
    for _ in range(draw.randrange(1, 5)):
        at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        match draw.randrange(5):
            case 0:
                data = data[:at] + data[end:]
            case 1:
                data = data[:end] + data[at:end] + data[end:]
            case 2:
                data = data[:at] + draw.choice(PARTS) + data[at:]
            case 3:
                data = data[:at] + draw.randbytes(draw.randrange(1, 4)) + data[at + 1 :]
            case _:
                data = data[:at] + data[end:] + data[at:end]
    return data[:4096]


@pytest.mark.parametrize("name", HARNESSES)
def test_it_holds_whatever_comes(name: str) -> None:
    draw = random.Random(f"tailrace {name}")
    known = seeds(name)
    for data in known:
        HARNESSES[name](data)
    for _ in range(RUNS):
        data = mutated(draw.choice(known), draw)
        try:
            HARNESSES[name](data)
        except Exception as error:
            raise AssertionError(f"{name} does not hold for {data!r}") from error


@pytest.mark.parametrize("name", HARNESSES)
def test_it_holds_for_noise(name: str) -> None:
    draw = random.Random(f"noise {name}")
    for _ in range(RUNS // 3):
        HARNESSES[name](draw.randbytes(draw.randrange(64)))
