"""Small arrays on their way to the device, without waiting for it."""

import numpy as np
import torch


def to_device(
    values: list[int] | list[float] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Return ``values`` on ``device``.

    A copy from ordinary memory waits until the device has done all its work. From pinned memory it does not; torch
    keeps that memory until the copy has happened.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
