"""Random numbers without a generator: each is a pure function of what it is drawn for.

A draw is keyed by (seed, choice, position, token id), so a token does not depend on batch-mates, on preemption or on
the process that computes it, and a run that is cut and continued draws the same numbers. The mixing function is
SplitMix64's finaliser (Steele, Lea, Flood 2014, figure 15), applied once per part of the key.
"""

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the 64-bit pattern ``value`` as torch's int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def draw_key(seed: int, choice: int, position: int) -> int:
    """Return the key of output position ``position`` of choice ``choice``, an int64."""
    return _signed(_mix_int(_mix_int(_mix_int(seed & _MASK) ^ choice) ^ position))


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own shift keeps the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise for each (row, token).

    ``keys`` int64 ``[rows, 1]`` from `draw_key`; ``token_ids`` int64, ``[rows, k]`` or ``[1, k]``. Returns float32
    ``[rows, k]``. ``argmax(logits + noise)`` is then a draw from ``softmax(logits)`` (Gumbel-max trick).
    """
    value = (token_ids + 1) * _signed(_GOLDEN) ^ keys
    value = (value ^ _shift(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift(value, 27)) * _signed(_MIX_2)
    value = value ^ _shift(value, 31)
    uniform = (_shift(value, 11).to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform)).to(torch.float32)
