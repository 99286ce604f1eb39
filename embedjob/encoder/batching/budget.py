"""Token budget of a micro-batch: the tokens that go through a model together, by measurement.

A budget changes the speed, never the vectors.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embedjob.encoder.batching.forward import Loaded, ViewForward
from embedjob.encoder.batching.scheduler import is_out_of_memory
from embedjob.encoder.batching.transfers import copy_to_host
from embedjob.text.views import TokenViews, assemble

_LOG = logging.getLogger(__name__)
# For fewer tokens, the search takes longer than a better budget saves.
WORTH_MEASURING = 100_000
# The share of the free memory that a micro-batch may take: later texts may be longer.
_MEMORY = 0.85
# A larger budget must be faster by this factor, otherwise it only takes memory.
_GAIN = 1.03


@dataclass(frozen=True)
class BudgetSearch:
    """Token budgets to try on a device, the time limit, and the default."""

    budgets: tuple[int, ...]
    seconds: float
    default: int


SEARCHES = {
    "cpu": BudgetSearch((512, 1024, 2048, 4096), 1.0, 1024),
    "cuda": BudgetSearch(tuple(1 << power for power in range(12, 19)), 10.0, 32768),
}


@dataclass(frozen=True)
class ProbeResult:
    """The tokens and seconds of a micro-batch, and the share of free memory that it took."""

    tokens: int
    seconds: float
    memory: float


def search_for(device: torch.device) -> BudgetSearch:
    """Return the budgets to try on this device."""
    return SEARCHES.get(device.type, SEARCHES["cuda"])


def measured_budget(views: TokenViews, loaded: Loaded) -> int:
    """Return the fastest budget for views like these that fits into the memory."""
    device = loaded.packing.backbone.device
    on_gpu = device.type == "cuda"
    # A GPU's memory must hold the longest possible views; on a CPU the usual length decides.
    sample, number = longest_view(views, loaded) if on_gpu else (views, _median(views))
    search = search_for(device)
    budget = fastest_budget(lambda tokens: _probe(sample, number, tokens, loaded), search)
    _LOG.info("%d tokens go through the model together", budget)
    return budget


def fastest_budget(probe: Callable[[int], ProbeResult], search: BudgetSearch) -> int:
    """Return the default budget unless others are clearly faster, else the smallest of those.

    Only budgets that fit into the memory count. The default is returned if the time is over
    before two budgets were tried, or if a probe raises.
    """
    until = time.monotonic() + search.seconds
    tried: list[tuple[int, float]] = []
    for budget in search.budgets:
        try:
            result = probe(budget)
        except Exception as error:
            # Views that break the model are reported by the run itself, which can name them.
            if is_out_of_memory(error):
                return _best(tried, search) if tried else max(1, budget // 2)
            return search.default
        if result.memory <= _MEMORY or not tried:
            tried.append((budget, result.tokens / result.seconds))
        if 2 * result.memory > _MEMORY or _is_flat(tried):
            return _best(tried, search)
        if time.monotonic() > until:
            return _best(tried, search) if len(tried) > 1 else search.default
    return _best(tried, search)


def _best(tried: Sequence[tuple[int, float]], search: BudgetSearch) -> int:
    most = max(speed for _, speed in tried)
    good = [budget for budget, speed in tried if speed * _GAIN >= most]
    return search.default if search.default in good else good[0]


def _is_flat(tried: Sequence[tuple[int, float]]) -> bool:
    """Tell whether the last two budgets were no faster than the best before them."""
    speeds = [speed for _, speed in tried]
    return len(speeds) > 3 and max(speeds[-2:]) < max(speeds[:-2]) * _GAIN


def _probe(views: TokenViews, number: int, budget: int, loaded: Loaded) -> ProbeResult:
    """Measure a micro-batch that repeats one view, after a first one that is not timed."""
    alone = ViewForward(views, np.array([number]), loaded)
    count = max(1, budget // int(alone.lengths[0]))
    forward = ViewForward(views, np.full(count, number), loaded)
    device, which = loaded.packing.backbone.device, np.arange(count)
    room = _room(device)
    copy_to_host(forward(which)).wait()
    memory = _taken(device) / room
    started = time.perf_counter()
    copy_to_host(forward(which)).wait()
    seconds = time.perf_counter() - started
    return ProbeResult(int(forward.lengths.sum()), max(seconds, 1e-9), memory)


def _room(device: torch.device) -> float:
    """Return the bytes free for a micro-batch, and reset the peak that `_taken` reads."""
    if device.type != "cuda":
        return np.inf
    torch.cuda.reset_peak_memory_stats(device)
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + kept)


def _taken(device: torch.device) -> float:
    """Return the bytes that a micro-batch took at its peak."""
    if device.type != "cuda":
        return 0.0
    return float(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))


def _median(views: TokenViews) -> int:
    full = np.flatnonzero(views.span[:, 0] < views.span[:, 1])
    return int(full[np.argsort(views.lengths[full])[len(full) // 2]])


def longest_view(views: TokenViews, loaded: Loaded) -> tuple[TokenViews, int]:
    """Return views with one of the greatest possible length, and its number."""
    # With late chunking a text goes whole through the model, however long it is.
    length = max(loaded.recipe.max_tokens, int(views.lengths.max()))
    ids = np.resize(views.full_ids(int(views.lengths.argmax())), length)
    span = np.array([[0, length]], np.int32)
    none = np.zeros(1, np.bool_)
    return assemble([ids.tolist()], span=span, truncated=none, prefixes=[()]), 0
