"""A GPU that answers nothing more in this process, told from a call that failed by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embedjob.errors import DeviceLostError


@contextmanager
def telling_of_loss() -> Iterator[None]:
    """Within it, and in a function that it decorates, a lost device raises DeviceLostError.

    Whatever else raises does as it did. Not only torch's own error is looked into: the libraries
    under it have words of their own for the same.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost():
            raise
        raise DeviceLostError(f"the device failed, its process must end: {error}") from error


def _is_lost() -> bool:
    try:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
    except torch.AcceleratorError:
        return True
    return False
