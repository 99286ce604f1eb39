"""Tensors between the host and a device, without either waiting for the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy to a GPU is queued there, and nothing waits for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # From memory that may be paged out, the copy would first wait for all that the GPU has to do.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class PendingCopy:
    """A tensor on its way to the host, and what waits for it; None if the tensor is there."""

    host: Tensor
    arrival: Callable[[], float] | None = None

    def wait(self) -> float:
        """The seconds that the copy took, once the tensor is there; raises what the device did."""
        return self.arrival() if self.arrival else 0.0


def copy_to_host(tensor: Tensor) -> PendingCopy:
    """The tensor, on its way to the host; a copy from a GPU is queued behind what makes it."""
    if tensor.device.type != "cuda":
        return PendingCopy(tensor.cpu())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = torch.cuda.current_stream(tensor.device)
    begun, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record(stream)
    host.copy_(tensor, non_blocking=True)
    there.record(stream)

    def arrival() -> float:
        there.synchronize()
        return float(begun.elapsed_time(there)) / 1000

    return PendingCopy(host, arrival)
