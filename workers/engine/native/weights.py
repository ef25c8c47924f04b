"""Weights in the form that the C step multiplies with."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from workers.engine.native import library

GROUP = 32
LANES = 16
PAIR = 2 * LANES


@dataclass(frozen=True)
class Codes:
    """A quantised matrix: weight = code * scale + minimum.

    ``codes`` uint8 ``[outputs, inputs]``, below 16 where ``bits`` is 4; ``scales`` and ``minima`` float16
    ``[outputs, inputs / 32]``.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray

    def rows(self, index: np.ndarray) -> "Codes":
        """Return the rows ``index`` in that order."""
        return Codes(self.bits, self.codes[index], self.scales[index], self.minima[index])

    def floats(self) -> np.ndarray:
        """Return the weights: float32 ``[outputs, inputs]``."""
        grouped = self.codes.reshape(len(self.codes), -1, GROUP).astype(np.float32)
        grouped = grouped * self.scales[..., None].astype(np.float32) + self.minima[..., None].astype(np.float32)
        return grouped.reshape(self.codes.shape)


Weights = Codes | np.ndarray


def joined(parts: list[Weights]) -> Weights:
    """Put matrices with the same inputs below each other; quantised ones only if all are."""
    codes = [part for part in parts if isinstance(part, Codes)]
    if len(codes) < len(parts):
        return np.concatenate([p.floats() if isinstance(p, Codes) else p for p in parts])
    return Codes(
        max(part.bits for part in codes),
        np.concatenate([part.codes for part in codes]),
        np.concatenate([part.scales for part in codes]),
        np.concatenate([part.minima for part in codes]),
    )


def interleaved(gate: Weights, up: Weights) -> Weights:
    """Return both matrices in turn, 16 rows of each: what the C step wants of a gated MLP."""
    both = joined([gate, up])
    if isinstance(both, Codes):
        return both.rows(interleaving(len(both.codes)))
    return both[interleaving(len(both))]


def padded(outputs: int) -> int:
    """Return ``outputs`` rounded up to whole pairs of tiles."""
    return -(-outputs // PAIR) * PAIR


def interleaving(rows: int) -> np.ndarray:
    """Return the order of the ``rows`` of two equal matrices when 16 of each stand in turn."""
    return np.arange(rows).reshape(2, -1, LANES).swapaxes(0, 1).reshape(-1)


class Packed:
    """A packed matrix and the memory behind it. ``matrix`` is valid as long as this object lives."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        weights: Weights,
        floats: int,
        bias: torch.Tensor | None = None,
        loras: int | None = None,
    ) -> None:
        """``floats``: the format of weights that are not quantised; ``loras``: address of an array of adapters."""
        values = weights.codes if isinstance(weights, Codes) else weights
        outputs, inputs = values.shape
        form = floats
        if isinstance(weights, Codes):
            form = library.Q4 if weights.bits == 4 else library.Q8
        self._data = aligned(lib.tr_packed_bytes(form, outputs, inputs))
        target = self._data.ctypes.data
        if isinstance(weights, Codes):
            parts = [np.ascontiguousarray(a) for a in (weights.codes, weights.scales, weights.minima)]
            lib.tr_pack_codes(target, form, *(a.ctypes.data for a in parts), outputs, inputs)
        else:
            rows = np.ascontiguousarray(weights, dtype=np.float32)
            lib.tr_pack_floats(target, form, rows.ctypes.data, outputs, inputs)
        self._bias = None
        if bias is not None:
            self._bias = np.zeros(padded(outputs), dtype=np.float32)
            self._bias[:outputs] = bias.detach().float().numpy()
        self.matrix = library.Matrix(
            form, outputs, inputs, target, None if self._bias is None else self._bias.ctypes.data, loras
        )

    @property
    def nbytes(self) -> int:
        return self._data.nbytes


def aligned(size: int) -> np.ndarray:
    """Return ``size`` zero bytes that begin on a border of 64 bytes."""
    memory = np.zeros(size + 64, dtype=np.uint8)
    shift = -memory.ctypes.data % 64
    return memory[shift : shift + size]
