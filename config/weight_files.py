"""Reads the headers of weight files - names, shapes, sizes - without numpy, torch or the weights themselves."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

GGUF_MAGIC = b"GGUF"
_LONGEST_HEADER = 256 * 1024 * 1024
# GGUF value types: struct format of each scalar; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class WeightFileError(Exception):
    """The file is damaged, or is not what its name says."""


@dataclass
class WeightHeader:
    """``shapes`` of the tensors as torch would show them (rows first), by name; ``metadata`` of a GGUF, without arrays
    (an array stands there as its length)."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, Any] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF does."""
    with path.open("rb") as file:
        return file.read(4) == GGUF_MAGIC


def read_safetensors(path: Path) -> WeightHeader:
    """Read one safetensors file's header. Raises `WeightFileError` if it is damaged or the file is cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise WeightFileError("is no safetensors file, or is cut inside its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(int(n) for n in tensor["shape"]) for name, tensor in header.items()}
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise WeightFileError("has a damaged safetensors header") from error
    if 8 + length + end != size:
        raise WeightFileError(f"is {size} bytes long where its header says {8 + length + end}: an incomplete copy?")
    return WeightHeader(shapes)


def read_gguf(path: Path) -> WeightHeader:
    """Read a GGUF file's header. Raises `WeightFileError` if it is no GGUF, is damaged, or the file is cut."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise WeightFileError("is no GGUF file")
        try:
            version, tensors, pairs = _unpack(file, "<IQQ")
            if version not in (2, 3):
                raise WeightFileError(f"is GGUF version {version}; versions 2 and 3 can be read")
            metadata = {_string(file): _value(file, _unpack(file, "<I")[0]) for _ in range(pairs)}
            shapes, end = {}, 0
            for name, dimensions, kind, offset in (_tensor(file) for _ in range(tensors)):
                shapes[name] = tuple(reversed(dimensions))
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                elements = 1
                for dimension in dimensions:
                    elements *= dimension
                end = max(end, offset + elements // block * block_bytes)
            alignment = metadata.get("general.alignment", 32)
            data_start = -(-file.tell() // alignment) * alignment
        except WeightFileError:
            raise
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError, TypeError, ZeroDivisionError) as error:
            raise WeightFileError("has a damaged GGUF header, or is cut inside it") from error
    if data_start + end > path.stat().st_size:
        raise WeightFileError("ends before its last tensor does: an incomplete copy?")
    return WeightHeader(shapes, metadata)


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _bytes(file: BinaryIO) -> bytes:
    (length,) = _unpack(file, "<Q")
    if length > _LONGEST_HEADER:
        raise ValueError("string too long")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("cut inside a string")
    return text


def _string(file: BinaryIO) -> str:
    return _bytes(file).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """Read one value; of an array only its length."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, "<" + _SCALARS[kind])[0]
    item_kind, length = _unpack(file, "<IQ")
    if item_kind in _SCALARS:
        file.seek(struct.calcsize("<" + _SCALARS[item_kind]) * length, 1)
    else:
        for _ in range(length):
            _bytes(file) if item_kind == _STRING else _value(file, item_kind)
    return length


def _tensor(file: BinaryIO) -> tuple[str, list[int], int, int]:
    """Name, dimensions (columns first), type, offset in the data."""
    name = _string(file)
    (count,) = _unpack(file, "<I")
    if count > 8:
        raise ValueError("too many dimensions")
    dimensions = list(_unpack(file, f"<{count}Q"))
    kind, offset = _unpack(file, "<IQ")
    return name, dimensions, kind, offset


def safetensors_files(folder: Path) -> Iterator[Path]:
    """Yield the weight files of a model directory: those its index names, or model.safetensors, or all there are.

    Raises `WeightFileError` for an index that cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightFileError(f"{index.name} cannot be read") from error
        yield from (folder / name for name in sorted(names))
    elif (folder / "model.safetensors").is_file():
        yield folder / "model.safetensors"
    else:
        yield from sorted(folder.glob("*.safetensors"))
