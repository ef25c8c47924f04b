"""Compiles the C sources once for this machine, and loads them.

The library is kept in the cache directory under a name made of everything that it depends on: the sources, the
compiler, the flags and the processor.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from workers.engine.errors import NoNativeStep

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
)
COMPILE_TIMEOUT_S = 300

F32, BF16, Q4, Q8 = range(4)


class Lora(ctypes.Structure):
    """As ``Lora`` in ``tailrace.h``."""

    _fields_ = (("rank", ctypes.c_int32), ("down", ctypes.c_void_p), ("up", ctypes.c_void_p))


class Matrix(ctypes.Structure):
    """A packed weight matrix; as ``Matrix`` in ``tailrace.h``."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("loras", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    """As ``Layer`` in ``tailrace.h``."""

    _fields_ = (
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int32),
    )


class Model(ctypes.Structure):
    """As ``Model`` in ``tailrace.h``."""

    _fields_ = (
        ("layer_count", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("cache_format", ctypes.c_int32),
        ("widest_rank", ctypes.c_int32),
        ("block_stride", ctypes.c_int64),
        ("norm_epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("inverse_frequencies", ctypes.c_void_p),
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", ctypes.c_void_p),
        ("embedding", Matrix),
        ("head", Matrix),
    )


class Batch(ctypes.Structure):
    """As ``Batch`` in ``tailrace.h``."""

    _fields_ = (
        ("tokens", ctypes.c_int32),
        ("span_count", ctypes.c_int32),
        ("wanted_count", ctypes.c_int32),
        ("ids", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
    )


def find_compiler() -> str | None:
    """Return the path of a C compiler, or None."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def load(cache_dir: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """Return the library, compiled now (some seconds) or at an earlier start.

    Raises `NoNativeStep` when there is no compiler or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NoNativeStep(f"no C compiler ({', '.join(COMPILERS)}) is installed")
    try:
        target = cache_dir / f"native-{_fingerprint(compiler, flags)}.so"
    except (OSError, subprocess.SubprocessError) as error:
        raise NoNativeStep(f"{compiler} cannot be run: {error}") from error
    if target.exists():
        # Damaged, by a full disk or a lost machine: it is made anew.
        with contextlib.suppress(NoNativeStep):
            return _opened(target)
    _compile(compiler, flags, target)
    return _opened(target)


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise NoNativeStep(f"{path} cannot be loaded: {error}") from error


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    digest.update("\0".join((compiler, *flags, platform.machine(), _processor())).encode() + version)
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            result = subprocess.run(
                [compiler, *flags, *sources, "-o", str(partial), "-lm"],
                capture_output=True,
                text=True,
                check=False,
                timeout=COMPILE_TIMEOUT_S,
            )
            if result.returncode:
                raise NoNativeStep(f"{compiler} failed: {_errors(result.stderr)}")
            with partial.open("rb") as compiled:
                os.fsync(compiled.fileno())
            partial.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoNativeStep(f"cannot compile into {target.parent}: {error}") from error


def _errors(said: str) -> str:
    """Return the beginning of what a compiler found wrong, as one line."""
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()
    return " ".join(" ".join(lines).split())[:500]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the functions."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    signatures = {
        "tr_threads_start": (pointer, [integer]),
        "tr_threads_stop": (None, [pointer]),
        "tr_touch": (None, [pointer, ctypes.c_size_t]),
        "tr_packed_bytes": (ctypes.c_size_t, [integer, integer, integer]),
        "tr_pack_floats": (None, [pointer, integer, pointer, integer, integer]),
        "tr_pack_codes": (None, [pointer, integer, pointer, pointer, pointer, integer, integer]),
        "tr_stack_new": (pointer, [ctypes.POINTER(Model), pointer]),
        "tr_stack_free": (None, [pointer]),
        "tr_phases": (None, [pointer, pointer]),
        "tr_sample": (None, [pointer, pointer, ctypes.c_int64, integer, integer, pointer, pointer]),
        "tr_step": (integer, [pointer, ctypes.POINTER(Batch)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
