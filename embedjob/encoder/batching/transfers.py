"""Host memory: asynchronous copies between the host and a device, and freed memory that is kept."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MEBIBYTE = 1 << 20


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


def keep_freed_memory() -> bool:
    """Let this process keep up to 128 MiB that it has freed, and return whether glibc agreed.

    Every micro-batch needs the same memory again. By default each layer's states are returned to
    the system, which then has to find and clear all of their pages anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # 32 MiB is the most that glibc accepts: larger blocks are returned at once.
    kept = mallopt(_M_TRIM_THRESHOLD, 128 * _MEBIBYTE)
    return bool(kept and mallopt(_M_MMAP_THRESHOLD, 32 * _MEBIBYTE))


def own_process(place: torch.device, threads: int) -> None:
    """Set up a process that only encodes."""
    torch.set_num_threads(threads)
    if place.type == "cpu":
        keep_freed_memory()
