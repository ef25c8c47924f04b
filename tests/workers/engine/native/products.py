"""The C library's products by themselves: packing, rounding of the inputs, multiplying."""

import ctypes
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.workers.engine.tiny import CACHE
from workers.engine.native import library
from workers.engine.native.weights import GROUP, LANES, PAIR, Packed, Weights

STORE, ADD, GATE = range(3)

# Not -O3: for plain x86-64 that takes the compiler half a minute.
_OTHERS = ("-O1", *(flag for flag in library.FLAGS if not flag.startswith(("-march", "-O"))))
# Compiler flags for other processors than this one, and for bfloat16's own products where they are not the faster ones.
PROCESSORS: dict[str, tuple[str, ...]] = {"this": library.FLAGS}
if platform.machine() == "x86_64":
    PROCESSORS["avx2"] = (*_OTHERS, "-march=x86-64-v3")
    PROCESSORS["plain"] = (*_OTHERS, "-march=x86-64")
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        PROCESSORS["bfloat16"] = (*library.FLAGS, "-D__builtin_cpu_is(name)=1")


@lru_cache
def kernels(processor: str = "this") -> ctypes.CDLL:
    """Return the library for ``processor``, with the functions of products.c."""
    return kernels_with(PROCESSORS[processor])


def kernels_with(flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return the library compiled with ``flags``, with the functions of products.c."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(shutil.copytree(library.SOURCES, Path(folder) / "csrc"))
        shutil.copy(Path(__file__).parent / "products.c", sources)
        with mock.patch.object(library, "SOURCES", sources):
            lib = library.load(CACHE, flags)
    integer, pointer, matrix = ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(library.Matrix)
    lib.test_row.argtypes = [matrix, integer, pointer]
    lib.test_round.argtypes = [pointer, integer, pointer, pointer, pointer]
    lib.test_multiply.argtypes = [matrix, pointer, integer, integer, pointer, integer]
    lib.test_row.restype = lib.test_round.restype = lib.test_multiply.restype = None
    return lib


class Products:
    """The kernels' parts as functions of numpy arrays."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.rounds_to_bf16 = bool(lib.test_rounds_to_bf16())

    def packed(self, weights: Weights, floats: int = library.F32, bias: Any = None) -> Packed:
        return Packed(self.lib, weights, floats, bias)

    def unpacked(self, weights: Packed) -> np.ndarray:
        """Return every row of a packed matrix: float32 ``[outputs, inputs]``."""
        matrix = weights.matrix
        # One number more on each side shows writes beyond a row.
        out = np.full((matrix.outputs, matrix.inputs + 2), -77, dtype=np.float32)
        for row in range(matrix.outputs):
            self.lib.test_row(matrix, row, out[row, 1:].ctypes.data)
        assert (out[:, 0] == -77).all()
        assert (out[:, -1] == -77).all()
        return out[:, 1:-1]

    def rounded(self, rows: np.ndarray) -> "Rounded":
        """Return the inputs as quantised weights are multiplied with them."""
        count, inputs = rows.shape
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        shape = (count, inputs // GROUP)
        result = Rounded(np.zeros(rows.shape, np.int8), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
        for n in range(count):
            arrays = (result.codes, result.scales, result.sums)
            self.lib.test_round(rows[n].ctypes.data, inputs, *(a[n].ctypes.data for a in arrays))
        return result

    def multiply(self, weights: Packed, rows: np.ndarray, finish: int = STORE, before: Any = None) -> np.ndarray:
        """Return the products of ``rows`` with a matrix: float32 ``[rows, outputs]``, half as many after a gate.

        ``before``: what the products are added to.
        """
        matrix = weights.matrix
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        width = -(-matrix.outputs // PAIR) * (LANES if finish == GATE else PAIR)
        used = matrix.outputs // 2 if finish == GATE else matrix.outputs
        # A row more at the end shows writes behind the last one.
        out = np.full((len(rows) + 1, width), -77, dtype=np.float32)
        if before is not None:
            out[:-1, :used] = before
        self.lib.test_multiply(matrix, rows.ctypes.data, len(rows), finish, out.ctypes.data, width)
        assert (out[-1] == -77).all()
        return out[:-1, :used]


class Rounded:
    """Inputs as int8 ``codes`` ``[rows, inputs]`` with ``scales`` and ``sums`` ``[rows, inputs / 32]``."""

    def __init__(self, codes: np.ndarray, scales: np.ndarray, sums: np.ndarray) -> None:
        self.codes, self.scales, self.sums = codes, scales, sums

    @property
    def values(self) -> np.ndarray:
        """What the codes stand for: float64 ``[rows, inputs]``."""
        return self.codes * np.repeat(self.scales.astype(np.float64), GROUP, axis=1)


@contextmanager
def processor_of_steps(processor: str) -> Iterator[None]:
    """Let every `NativeStep` that is made inside compute as on ``processor``."""
    with mock.patch.object(library, "load", return_value=kernels(processor)):
        yield
