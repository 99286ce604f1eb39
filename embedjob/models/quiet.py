"""Log levels: transformers without its progress bars and load reports, which would drown a log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports torchao wherever it is installed, which logs four lines about kernels for
# other devices and about a decorator of its own.
_CHATTY = ("torchao", "torch.utils._pytree")


def hush_imports() -> None:
    """Let what transformers imports log errors alone, unless a level was set for it."""
    for name in _CHATTY:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars, and from logging anything but errors."""
    # It takes seconds to import, and planning a model does without it.
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
