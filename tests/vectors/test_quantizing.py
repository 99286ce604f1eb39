"""Against sentence-transformers itself, bit for bit."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sentence_transformers.util.quantization import quantize_embeddings

from embedjob.config.fits.fit_kinds import Calibrate
from embedjob.errors import ConfigError, FitError
from embedjob.vectors.fits.fit_arithmetic import first_pass, problem_of
from embedjob.vectors.fits.fitted import Block, Fitted
from embedjob.vectors.quantizing import CALIBRATED, quantize, ranges_of

DTYPES = ("int8", "uint8", "binary", "ubinary")
FINITE = st.floats(-4, 4, width=32)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def both(
    embeddings_RD: np.ndarray, dtype: str, ranges_2D: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    theirs = quantize_embeddings(embeddings_RD, dtype, ranges=ranges_2D)
    return quantize(embeddings_RD, dtype, ranges_2D=ranges_2D), theirs


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 20), rows=st.integers(0, 5))
def test_every_bit_is_that_of_sentence_transformers(
    dtype: str, data: st.DataObject, width: int, rows: int
) -> None:
    embeddings_RD = data.draw(arrays(np.float32, (rows, width), elements=FINITE))
    sample = data.draw(arrays(np.float32, (2, width), elements=FINITE))
    ours, theirs = both(embeddings_RD, dtype, ranges_of(sample))
    assert same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 51])
def test_so_it_is_over_many_rows_which_go_in_blocks(dtype: str, width: int) -> None:
    random = np.random.default_rng(0)
    embeddings_RD = random.normal(size=(2500, width)).astype(np.float32)
    # Rows behind the sample leave its ranges, as those of a larger corpus do.
    ours, theirs = both(embeddings_RD, dtype, ranges_of(embeddings_RD[:100]))
    assert same(ours, theirs)
    assert ours.shape == (2500, width if dtype in CALIBRATED else (width + 7) // 8)
    assert same(ours, both(embeddings_RD.copy(order="F"), dtype, ranges_of(embeddings_RD[:100]))[0])


def test_the_ranges_are_those_that_sentence_transformers_finds() -> None:
    sample = np.random.default_rng(1).normal(size=(300, 16)).astype(np.float32)
    assert same(
        quantize(sample, "int8", ranges_2D=ranges_of(sample)),
        quantize_embeddings(sample, "int8", calibration_embeddings=sample),
    )


@pytest.mark.parametrize(("dtype", "zero"), [("int8", 128), ("uint8", 0)])
def test_the_value_of_a_code_is_within_a_bucket_of_what_was_stored(dtype: str, zero: int) -> None:
    """The formula of docs/operations.md."""
    embeddings_RD = np.random.default_rng(2).normal(size=(500, 8)).astype(np.float32)
    low_D, high_D = ranges_of(embeddings_RD)
    codes_RD = quantize(embeddings_RD, dtype, ranges_2D=np.stack([low_D, high_D]))
    restored_RD = low_D + (codes_RD.astype(np.float32) + zero) * (high_D - low_D) / 255
    off_RD = (embeddings_RD - restored_RD) / ((high_D - low_D) / 255)
    assert -1e-3 <= off_RD.min() <= off_RD.max() <= 1.001
    assert codes_RD.min() == -zero
    assert codes_RD.max() == 255 - zero


@pytest.mark.parametrize("dtype", sorted(CALIBRATED))
def test_without_ranges_there_are_no_buckets(dtype: str) -> None:
    with pytest.raises(ConfigError, match=rf"{dtype} needs the smallest .*from_output"):
        quantize(np.ones((3, 4), np.float32), dtype)


def test_floats_stay_or_are_halved() -> None:
    embeddings_RD = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
    assert quantize(embeddings_RD, "float32") is embeddings_RD
    assert same(quantize(embeddings_RD, "float16"), embeddings_RD.astype(np.float16))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=5).map(sorted))
def test_ranges_are_the_same_however_vectors_are_cut(cuts: list[int]) -> None:
    vectors_RD = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    step = first_pass(Calibrate(kind="calibrate", name="r"))
    parts = [part for part in np.split(vectors_RD, cuts) if len(part)]
    states = [step.partial(Block(part, np.zeros(len(part), np.uint64))) for part in parts]
    fitted = step.finish(reduce(step.merge, states))
    assert isinstance(fitted, Fitted)
    assert (problem_of(fitted), fitted.rows, fitted.width) == (None, 60, 5)
    assert np.array_equal(fitted.tensors["ranges"], ranges_of(vectors_RD))


def test_ranges_of_one_vector_and_of_no_numbers_are_refused() -> None:
    step = first_pass(Calibrate(kind="calibrate", name="r"))
    keys = np.zeros(1, np.uint64)
    with pytest.raises(FitError, match="got 1 vector, and ranges need at least 2; set a larger"):
        step.finish(step.partial(Block(np.ones((1, 3), np.float32), keys)))
    with pytest.raises(FitError, match="NaN"):
        step.partial(Block(np.full((1, 3), np.nan, np.float32), keys))
