"""Asynchronous copies between the host and a device: neither waits for the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; a copy to a GPU is queued there without waiting."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # A copy from memory that may be paged out would first wait for all work queued on the GPU.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class PendingCopy:
    """A tensor on its way to the host; `arrival` waits for it, and is None once it is there."""

    host: Tensor
    arrival: Callable[[], float] | None = None

    def wait(self) -> float:
        """Wait for the tensor and return the seconds of the copy; raise errors of the device."""
        return self.arrival() if self.arrival else 0.0


def copy_to_host(tensor: Tensor) -> PendingCopy:
    """Start copying a tensor to the host; a GPU does so after the work that computes it."""
    if tensor.device.type != "cuda":
        return PendingCopy(tensor.cpu())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = torch.cuda.current_stream(tensor.device)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record(stream)
    host.copy_(tensor, non_blocking=True)
    ended.record(stream)

    def arrival() -> float:
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1000

    return PendingCopy(host, arrival)
