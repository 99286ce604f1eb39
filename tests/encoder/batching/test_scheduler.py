"""Recovery by itself: a forward that computes vectors one can foresee, and raises where told."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder.batching import scheduler
from embedjob.encoder.batching.scheduler import Callbacks, ForwardResult, run_microbatches
from embedjob.encoder.batching.transfers import PendingCopy
from embedjob.errors import DeviceLostError, InterruptedRunError
from embedjob.text.arrays import Ints

WATCH = Callbacks(stop=lambda: False, on_views=lambda views: None)


def nothing(which: Ints) -> None:
    """Raises nothing."""


@dataclass
class Views:
    """The vector of view i is (i, i); trouble raises on what goes through, or on one alone."""

    lengths: npt.NDArray[np.int64]
    trouble: Callable[[Ints], None] = nothing
    trouble_alone: Callable[[Ints], None] = nothing
    not_finite: frozenset[int] = frozenset()
    still_not_finite: frozenset[int] = frozenset()
    kinds: int = 1
    bearable_padding: int | None = None
    batches: list[list[int]] = field(default_factory=list)
    width: int = 2

    @property
    def groups(self) -> Ints:
        return np.arange(len(self.lengths)) % self.kinds

    @property
    def pairs(self) -> Ints:
        return self.lengths**2

    def padded(self, which: Ints) -> int:
        return len(which) * int(self.lengths[which].max())

    def __call__(self, which: Ints) -> torch.Tensor:
        assert len(set(self.groups[which].tolist())) == 1
        self.batches.append(which.tolist())
        self.trouble(which)
        return self._vectors(which, self.not_finite)

    def in_float32(self, view: int) -> torch.Tensor:
        self.trouble_alone(np.array([view]))
        return self._vectors(np.array([view]), self.still_not_finite)

    def _vectors(self, which: Ints, holes: frozenset[int]) -> torch.Tensor:
        vectors = np.repeat(which[:, None], 2, axis=1).astype(np.float32)
        vectors[[view in holes for view in which]] = np.inf
        return torch.from_numpy(vectors)

    def passed(self, budget: int = 40, callbacks: Callbacks = WATCH) -> ForwardResult:
        return run_microbatches(self, budget=budget, callbacks=callbacks)


def poison(*views: int) -> Callable[[Ints], None]:
    def trouble(which: Ints) -> None:
        if set(views) & set(which.tolist()):
            raise IndexError(f"index {views[0]} is out of range")

    return trouble


def starved(tokens: int, lengths: npt.NDArray[np.int64]) -> Callable[[Ints], None]:
    def trouble(which: Ints) -> None:
        if len(which) * int(lengths[which].max()) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    return trouble


def right(passage: ForwardResult) -> bool:
    """Whether every view has its own vector, or a reason and none."""
    views = np.arange(len(passage.vectors_VD))
    lost = np.isin(views, list(passage.failed))
    good = (passage.vectors_VD == views[:, None]).all(axis=1)
    return bool((good ^ lost).all() and np.isnan(passage.vectors_VD[lost]).all())


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=40),
    poisoned=st.sets(st.integers(0, 39)),
    holes=st.sets(st.integers(0, 39)),
    budget=st.integers(1, 200),
    kinds=st.integers(1, 3),
)
def test_exactly_the_views_that_break_the_model_have_no_vector(
    lengths: list[int], poisoned: set[int], holes: set[int], budget: int, kinds: int
) -> None:
    views = Views(
        np.array(lengths, np.int64),
        trouble=poison(*poisoned),
        trouble_alone=poison(*poisoned),
        not_finite=frozenset(holes),
        still_not_finite=frozenset(holes),
        kinds=kinds,
    )
    passage = views.passed(budget)
    here = set(range(len(lengths)))
    assert right(passage)
    assert {v for v, (why, _) in passage.failed.items() if why == "model_error"} == poisoned & here
    assert {v for v, (why, _) in passage.failed.items() if why == "non_finite"} == (
        holes - poisoned
    ) & here


@dataclass
class Device:
    """One that gives vectors when they are waited for, and then may be in trouble."""

    trouble: Callable[[list[int]], None] = lambda views: None
    pending: list[list[int]] = field(default_factory=list)
    most: int = 0
    landed: int = 0

    def copy_to_host(self, vectors: torch.Tensor) -> PendingCopy:
        host = torch.full_like(vectors, 777.0)
        views = vectors.nan_to_num(posinf=0).amin(dim=1).int().tolist()
        self.pending.append(views)
        self.most = max(self.most, len(self.pending))

        def arrival() -> float:
            # As on a stream, what was given first comes first.
            assert self.pending.pop(0) is views
            self.trouble(views)
            host.copy_(vectors)
            self.landed += 1
            return 0.5

        return PendingCopy(host, arrival)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=40),
    poisoned=st.sets(st.integers(0, 39)),
    late=st.sets(st.integers(1, 39)),
    holes=st.sets(st.integers(0, 39)),
    memory=st.integers(30, 300),
)
def test_on_a_device_that_answers_late_the_same_views_have_no_vector(
    lengths: list[int], poisoned: set[int], late: set[int], holes: set[int], memory: int
) -> None:
    sizes = np.array(lengths, np.int64)

    def trouble(which: Ints) -> None:
        poison(*poisoned)(which)
        starved(memory, sizes)(which)

    def trouble_then(views: list[int]) -> None:
        if late & set(views):
            raise RuntimeError("an answer that never came")

    views = Views(
        sizes,
        trouble=trouble,
        trouble_alone=poison(*poisoned | late),
        not_finite=frozenset(holes),
        still_not_finite=frozenset(holes),
    )
    device = Device(trouble_then)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler, "copy_to_host", device.copy_to_host)
        passage = views.passed(300)
    here = set(range(len(lengths)))
    assert right(passage)
    assert not device.pending
    model = {view for view, (why, _) in passage.failed.items() if why == "model_error"}
    assert model == (poisoned | late) & here
    assert set(passage.failed) == (poisoned | late | holes) & here
    assert passage.copy_seconds == 0.5 * device.landed


def test_the_next_micro_batches_are_given_before_the_first_has_come() -> None:
    device = Device()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler, "copy_to_host", device.copy_to_host)
        assert right(Views(np.full(40, 10)).passed())
    assert device.most == 3


def test_on_a_cpu_a_micro_batch_is_done_before_the_next_is_made() -> None:
    seen: list[int] = []
    views = Views(np.full(12, 10))
    callbacks = Callbacks(
        stop=lambda: False, on_views=lambda which: seen.append(len(views.batches))
    )
    views.passed(callbacks=callbacks)
    assert seen == [1, 2, 3]


def test_the_reason_names_the_error_and_holds_no_traceback() -> None:
    passage = Views(np.full(9, 4), poison(3), poison(3)).passed()
    assert passage.failed == {3: ("model_error", "IndexError: index 3 is out of range")}


def test_what_fails_only_in_a_narrow_type_is_saved_by_float32() -> None:
    passage = Views(np.full(9, 4), trouble=poison(3), not_finite=frozenset({5})).passed()
    assert not passage.failed
    assert right(passage)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 200))
def test_out_of_memory_lowers_the_budget_for_all_that_follows(
    lengths: list[int], memory: int
) -> None:
    sizes = np.array(lengths, np.int64)
    views = Views(sizes, trouble=starved(memory, sizes))
    passage = views.passed(budget=1000)
    assert right(passage)
    assert not passage.failed
    failures = [b for b in views.batches if len(b) * max(sizes[b]) > memory]
    assert len(failures) <= 6
    assert passage.budget >= memory // 2


def test_a_view_too_large_for_the_memory_alone_is_left_out() -> None:
    sizes = np.array([50, 3, 3, 60, 3], np.int64)
    passage = Views(sizes, trouble=starved(20, sizes)).passed(budget=1000)
    assert sorted(passage.failed) == [0, 3]
    assert right(passage)
    assert "out of memory" in passage.failed[0][1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
def test_out_of_memory_is_known_by_its_many_names(error: Exception) -> None:
    def trouble(which: Ints) -> None:
        if len(which) > 2:
            raise error

    assert Views(np.full(8, 4), trouble).passed().budget == 8


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_lost_device_ends_the_process_and_blames_no_row(
    kind: type[Exception], gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost GPU raises on whatever it is asked, cuBLAS in words of its own; here the last one."""

    def synchronize(gpu: int) -> None:
        if gpu == gpus - 1:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    def trouble(which: Ints) -> None:
        raise kind("device-side assert")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    views = Views(np.full(8, 4), trouble)
    with pytest.raises(DeviceLostError, match="device-side assert"):
        views.passed()
    assert len(views.batches) == 1


def test_a_launch_that_fails_on_a_sound_device_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble(which: Ints) -> None:
        if len(which) > 2:
            raise torch.AcceleratorError("CUDA error: invalid configuration argument")
        poison(5)(which)

    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    passage = Views(np.full(8, 4), trouble, trouble_alone=poison(5)).passed()
    assert right(passage)
    assert list(passage.failed) == [5]
    assert set(asked) == {0}


def test_told_to_stop_it_stops_before_the_next_batch() -> None:
    views = Views(np.full(40, 10))
    callbacks = Callbacks(stop=lambda: len(views.batches) >= 3, on_views=lambda which: None)
    with pytest.raises(InterruptedRunError):
        views.passed(callbacks=callbacks)
    assert len(views.batches) == 3


def test_every_view_is_reported_once_and_tokens_are_counted_once() -> None:
    seen: list[int] = []
    views = Views(np.arange(1, 21), poison(7), poison(7))
    passage = views.passed(
        callbacks=Callbacks(lambda: False, lambda which: seen.extend(which.tolist()))
    )
    assert sorted(seen) == list(range(20))
    assert passage.tokens == sum(range(1, 21))
    assert passage.padded_tokens >= passage.tokens
