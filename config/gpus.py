"""Which NVIDIA GPUs this machine has, found out without CUDA."""

import ctypes
import importlib.metadata
import os
from pathlib import Path


def count() -> int:
    """Return the number of GPUs that can be used; 0 without driver, GPU, permission, or a torch built for CUDA."""
    return 0 if torch_is_for_cpu() else present()


def torch_is_for_cpu() -> bool:
    """Whether the installed torch is the build without CUDA, told from its version alone."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def present() -> int:
    """Return the number of GPUs that the driver offers.

    Asks NVML, which makes no CUDA context (a parent that touched CUDA could not start model workers), and falls back to
    what the kernel driver lists. ``CUDA_VISIBLE_DEVICES`` set to nothing hides all of them, as it does for CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    found = _count_by_nvml()
    return _count_by_driver() if found is None else found


def _count_by_nvml() -> int | None:
    """Return NVML's count, or None if NVML cannot be asked."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        number = ctypes.c_uint()
        status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(number))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return number.value if status == 0 else None


def _count_by_driver() -> int:
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return 0
