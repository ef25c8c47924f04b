"""The scripted engine in letters: its tokens are text to the real application, which finds a model card as usual."""

import os
import queue
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.app.tiny import ids_of, write_card
from tests.workers.pool import scripted_engine
from workers.config import WorkerConfig
from workers.messages import Order, Report

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter(prompt: list[int], position: int) -> str:
    """The one letter that belongs there."""
    return _LETTERS[(sum(prompt) * 31 + position * 7) % len(_LETTERS)]


def expected_text(prompt: list[int], max_tokens: int) -> str:
    """The text that a client must get."""
    return "".join(letter(prompt, position) for position in range(max_tokens))


def lost_device(directory: Path, index: int) -> Path:
    """While this file exists, the model worker ``index`` cannot start."""
    return directory / f"lost-{index}"


@cache
def _ids() -> dict[str, int]:
    return {each: ids_of(each)[0] for each in _LETTERS}


def _token(prompt: list[int], seed: int, choice: int, position: int) -> int:
    return _ids()[letter(prompt, position)]


def run(config: WorkerConfig, inbox: "queue.SimpleQueue[Order | None]", emit: Callable[[list[Report]], None]) -> None:
    """The engine contract of `workers.entry`."""
    folder = Path(config.runtime_dir)
    if lost_device(Path(config.cache_dir), config.index).exists():
        os._exit(9)
    write_card(folder).replace(folder / "card.json")
    scripted_engine.token = _token
    scripted_engine.run(config, inbox, emit)
