"""LoRA adapters in the form that the C step adds to its products."""

import ctypes
from typing import Any

import numpy as np
import torch

from workers.engine.lora import SharedLora
from workers.engine.native import library
from workers.engine.native.weights import LANES, interleaving, padded

# (A ``[rank, inputs]``, B ``[outputs, rank]`` times the scaling) of each adapter by name.
Updates = dict[str, tuple[torch.Tensor, torch.Tensor]]


def plain(module: Any) -> Any:
    """Return the layer under its adapters."""
    return module.base if isinstance(module, SharedLora) else module


def updates_of(module: Any) -> Updates:
    """Return what adapters add to a layer."""
    return module.updates if isinstance(module, SharedLora) else {}


class PackedLoras:
    """The adapters of one packed matrix; ``array`` is what C reads, valid as long as this object lives."""

    def __init__(self, adapters: list[str], modules: list[Any], *, interleaved: bool = False) -> None:
        """``modules``: the layers whose outputs the matrix has below each other, or in turn (``interleaved``)."""
        self.array = (library.Lora * len(adapters))()
        self.widest_rank = 0
        self._kept: list[np.ndarray] = []
        outputs = [plain(module).weight.shape[0] for module in modules]
        for place, name in enumerate(adapters):
            parts = [updates_of(module).get(name) for module in modules]
            if not any(parts):
                continue
            down = np.concatenate([part[0].float().numpy() for part in parts if part])
            up = np.zeros((padded(sum(outputs)), len(down)), dtype=np.float32)
            row = column = 0
            for part, size in zip(parts, outputs, strict=True):
                if part:
                    up[row : row + size, column : column + part[1].shape[1]] = part[1].float().numpy()
                    column += part[1].shape[1]
                row += size
            if interleaved:
                up[: sum(outputs)] = up[interleaving(sum(outputs))]
            up = np.ascontiguousarray(up.reshape(-1, LANES, len(down)).swapaxes(1, 2))
            down = np.ascontiguousarray(down)
            self._kept += [down, up]
            self.array[place] = library.Lora(len(down), down.ctypes.data, up.ctypes.data)
            self.widest_rank = max(self.widest_rank, len(down))

    @property
    def address(self) -> int | None:
        """Where the array is; None when no adapter changes the matrix."""
        return ctypes.addressof(self.array) if self.widest_rank else None
