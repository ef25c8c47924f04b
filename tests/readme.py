"""Finds the examples of a README that are marked as runnable."""

import re
from pathlib import Path

_BLOCK = re.compile(r"<!-- run -->\n```(sh|python)\n(.*?)\n```", re.DOTALL)


def examples(path: Path) -> list[tuple[str, str]]:
    """Return (language, text) of each fenced block behind a ``<!-- run -->`` mark."""
    return _BLOCK.findall(path.read_text(encoding="utf-8"))
