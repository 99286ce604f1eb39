"""BERT-flow against a reference that computes one number after the other."""

import math
import tracemalloc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedjob.config.fits.fit_kinds import Flow
from embedjob.errors import FitError
from embedjob.vectors.fits.fit_arithmetic import applied, first_pass, problem_of, width_after
from embedjob.vectors.fits.fitted import Block, Fitted, Training
from embedjob.vectors.fits.flow import (
    FlowTraining,
    _begun,
    _pass,
    bits_per_dimension,
    forward,
    inverse,
)

Tensors = Mapping[str, npt.NDArray[Any]]
SETTINGS = {"levels": 3, "depth": 2, "hidden": 5, "epochs": 6, "batch_size": 50}


def curved(rows: int = 1500, width: int = 16, *, seed: int = 0) -> npt.NDArray[np.float32]:
    """Vectors whose dimensions depend on each other, and not linearly."""
    numbers = np.random.default_rng(seed)
    plain = numbers.normal(size=(rows, width))
    plain[:, width // 2 :] += 2 * np.tanh(2 * plain[:, : width // 2])
    return (plain * np.geomspace(0.2, 3, width) + 0.7).astype(np.float32)


def fit(vectors_RD: npt.NDArray[np.float32], cuts: list[int] | None = None, **keys: Any) -> Fitted:
    section = Flow.model_validate({"kind": "flow", "name": "f", **SETTINGS, **keys})
    step = first_pass(section)
    row_keys = np.random.default_rng(1).integers(2**63, size=len(vectors_RD)).astype(np.uint64)
    parts = zip(np.split(vectors_RD, cuts or []), np.split(row_keys, cuts or []), strict=True)
    assert isinstance(step, Training)
    done = step.train(Block(*part) for part in parts)
    assert problem_of(done) is None
    return done


def literal(tensors: Tensors, vector: list[float]) -> tuple[list[float], float]:
    """One vector in the normal space and the log-determinant, as the papers write it.

    Actnorm, y = s (x + b) with s = exp(3 logs) (Glow, table 1); the reversal of the channels for
    its permutation; additive coupling, y_b = x_b + m(x_a) (NICE, 3.2); and a split after each level
    but the last (RealNVP, 3.6). m has two layers with actnorm and ReLU and a third whose output is
    scaled by exp(3 s), which all begin at 0.
    """
    out: list[float] = []
    log_determinant = 0.0
    levels = 1 + max(int(name.split(".")[0]) for name in tensors)
    for level in range(levels):
        depth = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith(f"{level}."))
        for step in range(depth):
            t = {n.split(".")[2]: tensors[n] for n in tensors if n.startswith(f"{level}.{step}.")}
            normed = []
            for x, b, logs in zip(vector, t["shift"], t["logscale"], strict=True):
                normed.append(math.exp(3 * logs) * (x + b))
                log_determinant += 3 * logs
            normed.reverse()
            half = len(normed) // 2
            a, b_half = normed[:half], normed[half:]
            hidden = a
            for layer in ("first", "second"):
                nodes = []
                for row, b, logs in zip(
                    t[layer], t[f"{layer}_shift"], t[f"{layer}_logscale"], strict=True
                ):
                    total = sum(w * h for w, h in zip(row, hidden, strict=True))
                    nodes.append(max(0.0, math.exp(3 * logs) * (total + b)))
                hidden = nodes
            moved = []
            for x, row, b, s in zip(
                b_half, t["last"], t["last_bias"], t["last_logscale"], strict=True
            ):
                total = sum(w * h for w, h in zip(row, hidden, strict=True)) + b
                moved.append(x + total * math.exp(3 * s))
            vector = a + moved
        if level < levels - 1:
            half = len(vector) // 2
            out += vector[half:]
            vector = vector[:half]
    return out + vector, log_determinant


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(curved())


def test_the_flow_is_that_of_the_papers(fitted: Fitted) -> None:
    vectors_RD = curved(20, seed=1).astype(np.float64)
    normal_RD, log_determinant = forward(fitted.tensors, vectors_RD)
    for row, vector in enumerate(vectors_RD.tolist()):
        wanted, wanted_determinant = literal(fitted.tensors, vector)
        np.testing.assert_allclose(normal_RD[row], wanted, rtol=1e-9, atol=1e-9)
        assert log_determinant == pytest.approx(wanted_determinant, abs=1e-9)
    after = applied(fitted, vectors_RD.astype(np.float32))
    np.testing.assert_allclose(after, normal_RD, rtol=0, atol=1e-4)
    assert (after.dtype, width_after(fitted)) == (np.float32, 16)


def test_training_and_application_are_the_same_map(fitted: Fitted) -> None:
    how = FlowTraining(3, 2, 5, 1, 50, 1e-3, 17)
    parameters = {name: torch.tensor(one) for name, one in fitted.tensors.items()}
    vectors_RD = curved(20, seed=1).astype(np.float64)
    trained_RD, trained = _pass(parameters, torch.from_numpy(vectors_RD), how)
    normal_RD, log_determinant = forward(fitted.tensors, vectors_RD)
    np.testing.assert_allclose(trained_RD.numpy(), normal_RD, rtol=1e-9, atol=1e-9)
    assert float(trained) == pytest.approx(log_determinant, abs=1e-9)


def test_the_log_determinant_is_that_of_its_jacobian(fitted: Fitted) -> None:
    how = FlowTraining(3, 2, 5, 1, 50, 1e-3, 17)
    parameters = {name: torch.tensor(one) for name, one in fitted.tensors.items()}
    vector = torch.from_numpy(curved(1, seed=2)[0].astype(np.float64))
    jacobian = torch.autograd.functional.jacobian(
        lambda one: _pass(parameters, one[None], how)[0][0], vector
    )
    _, logabsdet = torch.linalg.slogdet(jacobian)
    assert forward(fitted.tensors, vector.numpy()[None])[1] == pytest.approx(float(logabsdet))


def test_it_can_be_inverted(fitted: Fitted) -> None:
    vectors_RD = curved(200, seed=3)
    normal_RD = applied(fitted, vectors_RD)
    back_RD = inverse(fitted.tensors, normal_RD.astype(np.float64))
    np.testing.assert_allclose(back_RD, vectors_RD, rtol=0, atol=1e-5)


def test_it_makes_vectors_more_normal_than_scaling_does(fitted: Fitted) -> None:
    """By the likelihood of vectors that it was not trained on, in bits per dimension."""
    others_RD, train_RD = curved(1000, seed=4).astype(np.float64), curved().astype(np.float64)
    mean_D, deviation_D = train_RD.mean(axis=0), train_RD.std(axis=0)
    scaled = bits_per_dimension(
        (others_RD - mean_D) / deviation_D, float(-np.log(deviation_D).sum())
    )
    found = bits_per_dimension(*forward(fitted.tensors, others_RD))
    assert found < scaled - 0.05
    assert found == pytest.approx(fitted.facts["bits_per_dimension"], abs=0.1)


def test_a_seed_gives_one_flow_however_the_vectors_are_cut(fitted: Fitted) -> None:
    again, other = fit(curved(), [100, 700]), fit(curved(), seed=18)
    for name, tensor in fitted.tensors.items():
        assert np.array_equal(again.tensors[name], tensor), name
    assert not np.array_equal(other.tensors["0.0.first"], fitted.tensors["0.0.first"])


def test_it_stops_where_more_training_would_not_help() -> None:
    """Few vectors: the flow soon learns these and not their like."""
    assert fit(curved(60), epochs=200, batch_size=8).facts["epochs"] < 200


def test_the_beginning_is_normal_in_each_dimension() -> None:
    how = FlowTraining(2, 1, 5, 1, 50, 1e-3, 17)
    vectors_RD = torch.from_numpy(curved())
    with torch.no_grad():
        parameters = _begun(how, 16, torch.Generator().manual_seed(1))
        normal_RD, _ = _pass(parameters, vectors_RD, how, begin=True)
    np.testing.assert_allclose(normal_RD.mean(dim=0), 0, atol=1e-4)
    np.testing.assert_allclose(normal_RD.std(dim=0, unbiased=False), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("vectors_RD", "keys", "words"),
    [
        (curved(100, 12), {}, "width 12, which cannot be halved 3 times; set levels: 2"),
        (curved(100, 8)[:, :7], {}, "odd width 7"),
        (curved(3), {}, "got 3 vectors, and a flow needs some tens"),
        (np.full((50, 8), np.nan, np.float32), {}, "NaN"),
        (curved(), {"learning_rate": 1e6}, "set a smaller learning_rate"),
    ],
)
def test_what_gives_no_flow_is_refused(
    vectors_RD: npt.NDArray[np.float32], keys: dict[str, Any], words: str
) -> None:
    with np.errstate(all="ignore"), pytest.raises(FitError, match=words):
        fit(vectors_RD, **keys)


def test_memory_does_not_grow_with_the_vectors() -> None:
    """Blocks come, are put on disk, and go: at no moment are there more than a few of them."""
    rows, width = 120_000, 256
    section = Flow.model_validate(
        {"kind": "flow", "name": "f", "levels": 1, "depth": 1, "epochs": 1, "batch_size": 4096}
    )
    step = first_pass(section)
    assert isinstance(step, Training)

    def blocks() -> Iterator[Block]:
        numbers = np.random.default_rng(5)
        for _ in range(rows // 4000):
            vectors_RD = numbers.standard_normal((4000, width), np.float32)
            yield Block(vectors_RD, numbers.integers(2**63, size=4000).astype(np.uint64))

    tracemalloc.start()
    try:
        made = step.train(blocks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.rows == rows
    # All of them are 123 MB.
    assert peak < 30e6


def test_no_vectors_are_refused() -> None:
    step = first_pass(Flow(kind="flow", name="f"))
    assert isinstance(step, Training)
    with pytest.raises(FitError, match="got 0 vectors"):
        step.train([])
