"""Trajectories against the authors' procedure, `literal_trajectories.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedjob
from embedjob.config.fits.fit_kinds import SampledContinuations
from embedjob.config.generation import TrajectorySettings
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.sampling import StepCallbacks
from embedjob.encoder.trajectories import Trajectories, sampled_after
from embedjob.errors import ConfigError, EmbedjobError, InputError, ModelError
from embedjob.job.resolve import resolve_encoder
from tests.encoder.literal_trajectories import Literal
from tests.encoder.tiny import save, save_chat

LEFT = ["A man plays a guitar", "The fox jumps.", "How do I get funding?", "The fox jumps."]
RIGHT = ["Somebody plays music.", "The dog sleeps.", "how do I get funding", "The fox jumps."]
KEYS: dict[str, Any] = {"count": 4, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("trajectories"))


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_a_distance_is_that_of_the_authors_procedure(folder: Path, tau: float) -> None:
    literal = Literal(folder, count=4, length=12, tau=tau)
    expected = [literal.distance(*pair) for pair in zip(LEFT, RIGHT, strict=True)]
    found = embedjob.trajectory_distance(
        LEFT, RIGHT, model=str(folder), device="cpu", temperature=tau, **KEYS
    )
    assert np.abs(found - expected).max() <= 1e-5
    assert found[3] == 0
    assert (found[:3] > 0.1).all()
    said = [
        one for text in RIGHT for one in literal.sample(text, literal.tokenizer.encode(text).ids)
    ]
    assert len({len(one) for one in said}) > 1  # some continuations end a text


def test_the_company_of_a_pair_does_not_matter(folder: Path) -> None:
    settings = TrajectorySettings(**KEYS)
    alone = Trajectories.load(str(folder), settings, device="cpu")
    alone._most = 3
    whole = Trajectories.load(str(folder), settings, device="cpu")
    found = whole.distances(LEFT, RIGHT)
    apart = [float(alone.distances([a], [b])[0]) for a, b in zip(LEFT, RIGHT, strict=True)]
    assert np.abs(found - apart).max() <= 1e-5
    assert np.abs(whole.distances(RIGHT, LEFT) - found).max() <= 1e-5
    assert whole.distances([], []).shape == (0,)


def test_more_continuations_are_not_limited_by_rank(folder: Path) -> None:
    """With the usual limit of 50 tokens, no more than 50 would ever be said first."""
    settings = TrajectorySettings(count=400, max_new_tokens=1, temperature=20.0)
    trajectories = Trajectories.load(str(folder), settings, device="cpu")
    prompts = dict(zip(LEFT[:1], trajectories._prompts(LEFT[:1]), strict=True))
    [sampled] = trajectories._sampled(prompts, StepCallbacks(lambda: False, lambda: None))
    assert len({one[0] for one in sampled}) > 120


def test_the_vectors_of_a_pairs_own_continuations_are_as_far_apart_as_the_pair(
    folder: Path,
) -> None:
    """The anchors head and the exact distance are one arithmetic, reached by two roads."""
    encoder = {"method": "mean", "model": str(folder), "prepare": "fullstop"}
    recipe = resolve_encoder({**encoder, "attention": "causal"}, on_gpu=False).recipe
    section = SampledContinuations(kind="continuations", name="c", sample=2, seed=42, **KEYS)
    for pair in zip(LEFT[:3], RIGHT[:3], strict=True):
        anchors = sampled_after(recipe, pair, section, device="cpu")
        assert len(anchors) == 8
        scored = {
            **encoder,
            "attention": "causal",
            "heads": [{"continuations": anchors}],
            "aggregation": "concat",
            "finish": [],
        }
        one, other = Encoder.from_config(scored, device="cpu").encode(pair)
        distance = embedjob.trajectory_distance(
            pair[:1], pair[1:], model=str(folder), device="cpu", **KEYS
        )
        assert abs(np.abs(one - other).sum() - distance[0]) <= 1e-4


@pytest.mark.parametrize(
    ("texts", "keys", "error", "said"),
    [
        (
            (["a"], []),
            {},
            InputError,
            "got 1 text on the left and 0 on the right; pairs need equally",
        ),
        (([""], ["a"]), {}, InputError, "text '' has no token"),
        ((["a"], ["a"]), {"count": 0}, ConfigError, "settings.count: got 0"),
        ((["a"], ["a"]), {"cuont": 1}, ConfigError, "unknown key cuont"),
        ((["a"], ["a"]), {"prompt": "Say"}, ConfigError, "allowed is a text with one {text}"),
        ((["a"], ["a"]), {"max_new_tokens": 5000}, ModelError, "has 4096 positions; lower it"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folder: Path,
    texts: tuple[list[str], list[str]],
    keys: dict[str, Any],
    error: type[EmbedjobError],
    said: str,
) -> None:
    with pytest.raises(error) as refused:
        embedjob.trajectory_distance(*texts, model=str(folder), device="cpu", **keys)
    assert said in str(refused.value)


def test_an_encoder_goes_on_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is an encoder, which predicts no next token"):
        embedjob.trajectory_distance(["a"], ["b"], model=str(save("bert", tmp_path)))
