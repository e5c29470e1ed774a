"""Copies from the host to a device."""

from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor's copy on the device, made without waiting for the device; the tensor itself on CPUs."""
    return tensor if device.type == "cpu" else pinned(tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """A host tensor in page-locked memory, from which copies do not wait; the tensor itself without a GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def column(values: list[Any], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """These numbers or truth values on the device, `[len(values)]`, copied without waiting for the device."""
    return to_device(torch.tensor(values, dtype=dtype), device)
