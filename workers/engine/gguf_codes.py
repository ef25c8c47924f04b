"""The quantised weights of a GGUF file as they are, under transformers' names and in its order of rows.

GGUF's block formats (ggml's ``ggml-common.h`` describes them) all say ``weight = code * scale + minimum`` for each 32
weights of a row, once their packing is undone; formats with smaller groups are rounded anew to 8 bits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors.numpy import load_file, save_file
from transformers import modeling_gguf_pytorch_utils as transformers_gguf

from workers.engine.native.weights import GROUP, Codes

# Codes of more bits than these are no smaller than what they came from.
_WHOLE = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
# Largest accepted difference between our reading of a matrix and the library's, relative to its largest weight.
TOLERANCE = 1e-3
# Rounding anew to 8 bits moves a weight by half a step of its group at most: 1/510 of the group's span.
ROUNDING_TOLERANCE = 5e-3

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def _halves(raw: np.ndarray) -> np.ndarray:
    """Two bytes at the end of the last axis as float16, that axis gone."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """``[..., 16]`` bytes -> ``[..., 32]``: the low halves, then the high halves."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _high_bits(raw: np.ndarray) -> np.ndarray:
    """``[..., 4]`` bytes -> ``[..., 32]``: their 32 bits, each as 16 (the fifth bit of a code)."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> Parts:
    scale = _halves(blocks[..., :2])
    return _nibbles(blocks[..., 2:]), scale, -8 * scale


def _q4_1(blocks: np.ndarray) -> Parts:
    return _nibbles(blocks[..., 4:]), _halves(blocks[..., :2]), _halves(blocks[..., 2:4])


def _q5_0(blocks: np.ndarray) -> Parts:
    scale = _halves(blocks[..., :2])
    return _nibbles(blocks[..., 6:]) | _high_bits(blocks[..., 2:6]), scale, -16 * scale


def _q5_1(blocks: np.ndarray) -> Parts:
    codes = _nibbles(blocks[..., 8:]) | _high_bits(blocks[..., 4:8])
    return codes, _halves(blocks[..., :2]), _halves(blocks[..., 2:4])


def _q8_0(blocks: np.ndarray) -> Parts:
    scale = _halves(blocks[..., :2])
    return blocks[..., 2:] ^ 0x80, scale, -128 * scale


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the 8 groups of Q4_K and Q5_K: 6 bits each, times one float16 for all."""
    scale = _halves(blocks[..., :2])[..., None].astype(np.float32)
    minimum = _halves(blocks[..., 2:4])[..., None].astype(np.float32)
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return (scale * scales).astype(np.float16), (-minimum * minima).astype(np.float16)


def _k_codes(raw: np.ndarray) -> np.ndarray:
    """``[..., 128]`` bytes -> ``[..., 8, 32]``: of each 32 bytes first the low halves, then the high halves."""
    pairs = raw.reshape(*raw.shape[:-1], 4, 1, GROUP)
    return np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(*raw.shape[:-1], 8, GROUP)


def _q4_k(blocks: np.ndarray) -> Parts:
    return _k_codes(blocks[..., 16:]), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> Parts:
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _k_codes(blocks[..., 48:]) | high << 4, *_k_scales(blocks)


_READERS: dict[GGMLQuantizationType, tuple[int, int, Callable[[np.ndarray], Parts]]] = {
    # (bits of a code, bytes of a block, reader)
    GGMLQuantizationType.Q4_0: (4, 18, _q4_0),
    GGMLQuantizationType.Q4_1: (4, 20, _q4_1),
    GGMLQuantizationType.Q5_0: (8, 22, _q5_0),
    GGMLQuantizationType.Q5_1: (8, 24, _q5_1),
    GGMLQuantizationType.Q8_0: (8, 34, _q8_0),
    GGMLQuantizationType.Q4_K: (4, 144, _q4_k),
    GGMLQuantizationType.Q5_K: (8, 176, _q5_k),
}


def codes_of(raw: np.ndarray, kind: GGMLQuantizationType) -> Codes:
    """Return the codes of a quantised matrix: ``raw`` uint8 ``[outputs, bytes]`` as in the file.

    Raises ValueError where a row is not made of groups of 32.
    """
    if kind not in _READERS:
        return rounded(dequantize(raw, kind))
    bits, size, read = _READERS[kind]
    codes, scales, minima = read(raw.reshape(len(raw), -1, size))
    return Codes(bits, *(np.ascontiguousarray(a.reshape(len(raw), -1)) for a in (codes, scales, minima)))


def rounded(weights: np.ndarray) -> Codes:
    """Round float32 ``[outputs, inputs]`` to 8 bits, each group of 32 between its least and its largest weight."""
    if weights.shape[1] % GROUP:
        raise ValueError(f"rows of {weights.shape[1]} weights are not groups of {GROUP}")
    grouped = weights.reshape(len(weights), -1, GROUP).astype(np.float32)
    minima = grouped.min(axis=-1).astype(np.float16)
    scales = ((grouped.max(axis=-1) - minima) / 255).astype(np.float16)
    divisor = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    codes = np.rint((grouped - minima.astype(np.float32)[..., None]) / divisor).clip(0, 255).astype(np.uint8)
    return Codes(8, codes.reshape(weights.shape), scales, minima)


def read_codes(path: Path, model: Any) -> dict[str, Codes]:
    """Return the quantised matrices of the file by the parameter names of ``model``, which holds the same weights.

    A matrix that does not come out as the model has it is left out; without any that is quantised nothing is returned.
    """
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    config = model.config.get_text_config().to_dict()
    processor = transformers_gguf.TENSOR_PROCESSORS.get(architecture, transformers_gguf.TensorProcessor)(config=config)
    names = transformers_gguf.get_gguf_hf_weights_map(model, processor)
    parameters = dict(model.named_parameters())
    found: dict[str, Codes] = {}
    for tensor in reader.tensors:
        parameter = parameters.get(names.get(tensor.name, ""))
        if parameter is None or parameter.ndim != 2 or tensor.tensor_type in _WHOLE or parameter.shape[1] % GROUP:
            continue
        # The library reorders the rows of some matrices: let it do the same to their numbers.
        numbers = np.arange(len(tensor.data)).reshape(-1, 1)
        moved = processor.process(
            weights=numbers, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        )
        if moved.weights is None or moved.weights.shape != numbers.shape:
            continue
        codes = codes_of(np.asarray(tensor.data), tensor.tensor_type).rows(moved.weights[:, 0])
        limit = TOLERANCE if tensor.tensor_type in _READERS else ROUNDING_TOLERANCE
        if _matches(codes, parameter, limit):
            found[names[tensor.name]] = codes
    return found


def _matches(codes: Codes, parameter: torch.Tensor, limit: float) -> bool:
    expected = parameter.detach().float().numpy()
    if codes.codes.shape != expected.shape:
        return False
    limit += torch.finfo(parameter.dtype).eps
    return bool(np.abs(codes.floats() - expected).max() <= limit * np.abs(expected).max())


def save(codes: dict[str, Codes], path: Path) -> None:
    """Keep ``codes`` in a file."""
    arrays: dict[str, np.ndarray] = {}
    for name, c in codes.items():
        arrays |= {f"{name}:{c.bits}:codes": c.codes, f"{name}:{c.bits}:scales": c.scales}
        arrays[f"{name}:{c.bits}:minima"] = c.minima
    save_file(arrays, path)


def restore(path: Path) -> dict[str, Codes]:
    """Return what `save` kept."""
    arrays = load_file(path)
    found = {}
    for key in arrays:
        name, bits, part = key.rsplit(":", 2)
        if part == "codes":
            prefix = f"{name}:{bits}:"
            found[name] = Codes(int(bits), arrays[key], arrays[prefix + "scales"], arrays[prefix + "minima"])
    return found
