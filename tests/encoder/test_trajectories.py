"""Trajectories against the authors' procedure: one sequence at a time, no cache, no padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import embedjob
from embedjob.config.generation import TrajectorySettings
from embedjob.encoder.sampling import Callbacks
from embedjob.encoder.trajectories import Trajectories
from embedjob.errors import ConfigError, EmbedjobError, InputError, ModelError
from embedjob.text.conversations import draw_key, text_hash, uniforms
from tests.encoder.tiny import save, save_chat
from tests.fakes import tiny_tokenizer

LEFT = ["A man plays a guitar", "The fox jumps.", "How do I get funding?", "The fox jumps."]
RIGHT = ["Somebody plays music.", "The dog sleeps.", "how do I get funding", "The fox jumps."]
KEYS: dict[str, Any] = {"count": 4, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("trajectories"))


class Literal:
    """text2text_main.py and utils.py, with a number in place of each multinomial draw."""

    def __init__(self, folder: Path, *, count: int, length: int, tau: float = 1.0) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.tokenizer = tiny_tokenizer("qwen")
        self.eos = self.tokenizer.token_to_id("<|im_end|>")
        self.count, self.length, self.tau = count, length, tau

    @torch.inference_mode()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0] / self.tau, dim=-1)

    def sample(self, text: str, ids: list[int]) -> list[list[int]]:
        trajectories = []
        for number in range(self.count):
            key = draw_key(text_hash(text), seed=42, kind="trajectory", number=number)
            said: list[int] = []
            for share in uniforms(key, self.length):
                sums = self.log_probs([*ids, *said])[-1].exp().double().cumsum(dim=0)
                said.append(int((sums / sums[-1] <= share).sum()))
                if said[-1] == self.eos:
                    break
            trajectories.append(said)
        return trajectories

    def score(self, ids: list[int], trajectory: list[int]) -> float:
        found = self.log_probs([*ids, *trajectory])
        places = range(len(ids) - 1, len(ids) + len(trajectory) - 1)
        own = [float(found[p, t]) for p, t in zip(places, trajectory, strict=True)]
        return sum(own) / len(own)

    def distance(self, left: str, right: str) -> float:
        texts = (left, right)
        prompts = [self.tokenizer.encode(t if t[-1] in ".?" else f"{t}.").ids for t in texts]
        sampled = [self.sample(*pair) for pair in zip(texts, prompts, strict=True)]
        every = [*sampled[0], *sampled[1]]
        a, b = ([self.score(prompt, one) for one in every] for prompt in prompts)
        return float(np.linalg.norm(np.array(a) - np.array(b), ord=1))


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
    [sampled] = trajectories._sampled(LEFT[:1], prompts, Callbacks(lambda: False, lambda: None))
    assert len({one[0] for one in sampled}) > 120


@pytest.mark.parametrize(
    ("texts", "keys", "error", "said"),
    [
        ((["a"], []), {}, InputError, "got 1 texts on the left and 0 on the right"),
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
