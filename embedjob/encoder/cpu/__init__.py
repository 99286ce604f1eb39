"""CPU inference: fused layers of a float32 model, and memory that is kept for reuse."""

import ctypes

# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MEBIBYTE = 1 << 20


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
