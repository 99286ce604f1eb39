"""How many cores one encoder's process may use."""

import torch


def use_threads(count: int) -> None:
    """Return once this process computes with that many threads."""
    torch.set_num_threads(count)
