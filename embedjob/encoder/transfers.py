"""Tensors between the host and a device, without either waiting for the other."""

from dataclasses import dataclass

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy to a GPU is queued there, and nothing waits for it."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    # From memory that may be paged out, the copy would first wait for all that the GPU has to do.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Landing:
    """A tensor on its way to the host: `there` is set once it has come, None if it is there."""

    host: Tensor
    begun: torch.cuda.Event | None = None
    there: torch.cuda.Event | None = None

    def wait(self) -> float:
        """The seconds that the copy took, once the tensor is there; what the device raised."""
        if self.begun is None or self.there is None:
            return 0.0
        self.there.synchronize()
        return float(self.begun.elapsed_time(self.there)) / 1000


def homeward(tensor: Tensor) -> Landing:
    """The tensor, on its way to the host; a copy from a GPU is queued behind what makes it."""
    if tensor.device.type != "cuda":
        return Landing(tensor.cpu())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = torch.cuda.current_stream(tensor.device)
    begun, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record(stream)
    host.copy_(tensor, non_blocking=True)
    there.record(stream)
    return Landing(host, begun, there)
