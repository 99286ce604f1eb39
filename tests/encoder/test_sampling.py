"""Draws on models of every family: together and padded as one by one, without a cache."""

import pytest
import torch

from embedjob.encoder.sampling import Sampling, StepCallbacks, continued
from embedjob.errors import ModelError
from embedjob.text.conversations import draw_key, text_hash, uniforms
from tests.encoder.tiny import DECODERS, model

PROMPTS = [[5, 9, 14], [7], [3, 30, 300, 301, 302, 303, 304, 8], [11, 12]]
KEYS = [draw_key(text_hash(str(n)), seed=1, kind="k", number=0) for n in range(len(PROMPTS))]
SAMPLING = Sampling(1.0, 0.9, 8, (2, 40, 41, 42, 43))
QUIET = StepCallbacks(lambda: False, lambda: None)


@torch.inference_mode()
def one_by_one(name: str, prompt: list[int], key: bytes) -> list[int]:
    said: list[int] = []
    own = model(name)
    for number in uniforms(key, SAMPLING.steps):
        shares = own(torch.tensor([[*prompt, *said]]), use_cache=False).logits[0, -1].softmax(dim=0)
        best, order = shares.sort(descending=True)
        kept = order[best.cumsum(dim=0) - best < SAMPLING.top_p]
        inside = torch.zeros_like(shares, dtype=torch.float64)
        inside[kept] = shares[kept].double()
        said.append(int((inside.cumsum(dim=0) / inside.sum() <= number).sum()))
        if said[-1] in SAMPLING.stops:
            break
    return said


@pytest.mark.parametrize("name", DECODERS)
def test_a_sequence_goes_on_as_if_it_were_alone(name: str) -> None:
    found = continued(model(name), PROMPTS, KEYS, SAMPLING, QUIET)
    expected = [one_by_one(name, *pair) for pair in zip(PROMPTS, KEYS, strict=True)]
    assert [SAMPLING.until_stop(ids, with_stop=True) for ids in found] == expected


def test_a_sequence_ends_with_or_without_the_id_that_ends_it() -> None:
    assert SAMPLING.until_stop([1, 40, 3, 2]) == [1]
    assert SAMPLING.until_stop([1, 40, 3, 2], with_stop=True) == [1, 40]
    assert SAMPLING.until_stop([1, 3]) == [1, 3]


def test_an_id_without_an_embedding_is_named() -> None:
    with pytest.raises(ModelError, match="gave id 600, but the model embeds only 600"):
        continued(model("llama"), [[600]], KEYS[:1], SAMPLING, QUIET)
