"""The servers that Tailrace is compared with: how each is installed (`make peers`) and where it lies then."""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


def folder() -> Path:
    """Return the directory of all peers: `.peers` of the project, or what TAILRACE_PEERS says."""
    return Path(os.environ.get("TAILRACE_PEERS") or ROOT / ".peers").absolute()


@dataclass(frozen=True)
class Place:
    """Where one peer lies. Its ``stamp`` holds the version and is written last: half a peer counts as none."""

    name: str

    @property
    def path(self) -> Path:
        return folder() / self.name

    @property
    def stamp(self) -> Path:
        return self.path / "installed-version"

    @property
    def version(self) -> str | None:
        """What is installed, or None."""
        return self.stamp.read_text(encoding="utf-8").strip() if self.stamp.is_file() else None

    def executable(self, name: str) -> Path:
        return self.path / "bin" / name


WEIGHTS = Place("weights-bf16")
LLAMA = Place("llama-server")
VLLM = Place("vllm")
TRANSFORMERS = Place("transformers")
