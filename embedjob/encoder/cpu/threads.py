"""How one encoder's process uses the cores and the memory that it was given."""

import ctypes

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MEBIBYTE = 1 << 20


def use_threads(count: int) -> None:
    """Return once this process computes with that many threads."""
    torch.set_num_threads(count)


def keep_freed_memory() -> bool:
    """Whether this process keeps up to 128 MiB that it has freed, as every micro-batch needs it.

    Else the states of every layer are given back to the system, and all of their pages are to be
    had and cleared anew. It can be asked of glibc alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The second is the most that glibc takes: what is larger is given back at once.
    kept = mallopt(_M_TRIM_THRESHOLD, 128 * _MEBIBYTE)
    return bool(kept and mallopt(_M_MMAP_THRESHOLD, 32 * _MEBIBYTE))
