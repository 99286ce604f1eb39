"""Sampled decoding: a text draws the same words in every batch, order and split."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.heads import Decode
from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.outputs.decoding import decode, draws_of
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.errors import ConfigError
from embedjob.output.fingerprint import fingerprint
from embedjob.text.conversations import draw_key, uniforms
from embedjob.text.tokenizing import ViewTokenizer
from tests.encoder import tiny

PROMPTS = [[5, 9, 120], [77], [300, 12, 8, 41, 90, 7], [5, 9, 121]]
SAMPLED: dict[str, Any] = {"max_tokens": 6, "until": "q", "temperature": 1.0}
TEXTS = ["The quick brown fox", "a", "it's 日 fine, don't you think? " * 2, "a fox", "b"]


def recipe(directory: Path, **options: Any) -> Recipe:
    keys = {"model": str(directory), "dtype": "float32", "max_tokens": 40, "finish": []}
    return recipe_from({**keys, "span": "last_token", "decode": {**SAMPLED, **options}}, {})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backbone(llama: Path) -> Backbone:
    return load_backbone(recipe(llama), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(llama: Path, backbone: Backbone) -> dict[str, np.ndarray]:
    """The vector of each text that is drawn for by itself."""
    made = recipe(llama)
    return {text: Encoder(backbone, made).encode([text])[0] for text in TEXTS}


@torch.inference_mode()
def literal(name: str, ids: list[int], *, options: Decode, stops: list[int]) -> list[np.ndarray]:
    """The states from which words are drawn: a whole pass for each, shares in float64."""
    own, said, states = tiny.model(name), list[int](), list[np.ndarray]()
    key = hashlib.blake2b(np.array(ids, "<u4").tobytes(), digest_size=16).digest()
    key = draw_key(key, seed=options.seed, kind="decode", number=0)
    for number in uniforms(key, options.max_tokens):
        found = own(torch.tensor([[*ids, *said]]), use_cache=False, output_hidden_states=True)
        states.append(found.hidden_states[-1][0, -1].numpy())
        shares = (found.logits[0, -1].double() / options.temperature).softmax(dim=0)
        said.append(int((shares.cumsum(dim=0) <= number).sum()))
        if said[-1] in stops:
            return states[: max(1, len(states) - 1)]
    return states


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_words_are_those_of_a_literal_loop_over_each_text(name: str, temperature: float) -> None:
    head = LanguageHead(tiny.model(name))
    backbone = Backbone(head.body, attention="causal", head=head)
    options = Decode(max_tokens=6, temperature=temperature, seed=5)
    # So many words end a decoding that some do.
    stops = [*range(0, 600, 5)]
    expected = [literal(name, ids, options=options, stops=stops) for ids in PROMPTS]
    assert len({len(states) for states in expected}) > 1
    draws = draws_of([np.array(ids, np.uint32) for ids in PROMPTS], options)
    for side in ("right", "left"):
        padded = _padded(side)
        said = decode(backbone, head, padded, steps=6, stops=torch.tensor(stops), draws=draws)
        for row, states in enumerate(expected):
            counted = said.states_VSD[row][said.counts_VS[row]].numpy()
            assert np.abs(counted - np.stack(states)).max() <= 1e-4


def _padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids_VT = torch.zeros(len(PROMPTS), longest, dtype=torch.long)
    mask_VT = torch.zeros(len(PROMPTS), longest, dtype=torch.bool)
    for row, ids in enumerate(PROMPTS):
        at = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        ids_VT[row, at], mask_VT[row, at] = torch.tensor(ids), True
    return ids_VT, mask_VT


@settings(max_examples=15)
@given(
    order=st.permutations([*range(len(TEXTS)), 0, 3]),
    budget=st.sampled_from([1, 20, 45, 100, 10_000]),
    cut=st.integers(0, len(TEXTS)),
)
def test_any_order_batch_and_company_draws_the_same(
    order: list[int],
    budget: int,
    cut: int,
    llama: Path,
    backbone: Backbone,
    alone: dict[str, np.ndarray],
) -> None:
    """As a retry, another actor, or another chunk of the same texts would draw them."""
    texts = [TEXTS[number] for number in order]
    encoder = Encoder(backbone, recipe(llama), tokens_per_microbatch=budget)
    for part in (texts[:cut], texts[cut:]):
        found = encoder.encode(part) if part else []
        for text, vector in zip(part, found, strict=True):
            assert np.abs(vector - alone[text]).max() <= 1e-4


def test_the_seed_and_the_temperature_decide_what_is_drawn(
    llama: Path, backbone: Backbone, alone: dict[str, np.ndarray]
) -> None:
    greedy = {"temperature": 0.0}
    others = [recipe(llama, **one) for one in ({"seed": 7}, {"temperature": 3.0}, greedy)]
    vectors = [Encoder(backbone, one).encode(TEXTS) for one in others]
    vectors.append(np.stack([alone[text] for text in TEXTS]))
    for number, one in enumerate(vectors):
        for other in vectors[:number]:
            assert np.abs(one - other).max() > 1e-2
    hashed = {fingerprint(one, {}) for one in [*others, recipe(llama)]}
    assert len(hashed) == 4
    # What is as before has the fingerprint that it had.
    before = recipe_from(
        {**recipe(llama).model_dump(exclude={"decode"}), "decode": {"max_tokens": 6, "until": "q"}},
        {},
    )
    assert fingerprint(others[2], {}) == fingerprint(before, {})


@pytest.mark.parametrize("temperature", [1e-4, 1e-300])
def test_next_to_no_temperature_takes_the_likeliest(
    temperature: float, llama: Path, backbone: Backbone
) -> None:
    cold, greedy = recipe(llama, temperature=temperature), recipe(llama, temperature=0.0)
    vectors = [Encoder(backbone, one).encode(TEXTS) for one in (cold, greedy)]
    assert np.abs(vectors[0] - vectors[1]).max() <= 1e-4


def test_texts_with_the_same_view_draw_the_same_and_others_do_not(llama: Path) -> None:
    """A text is known by its tokens under the template: equal views go through the model once."""
    made = recipe(llama).model_copy(update={"prepare": "strip"})
    views = ViewTokenizer(tiny.tokenizer("llama"), made).views(["a fox", " a fox ", "a fox."])
    ids = [views.full_ids(view) for view in range(3)]
    assert made.decode is not None
    drawn = draws_of(ids, made.decode)
    assert drawn is not None
    first, second, third = drawn.numbers_VS.tolist()
    assert first == second
    assert not {*first} & {*third}
    # Another length of words begins with the same.
    longer = draws_of(ids, made.decode.model_copy(update={"max_tokens": 9}))
    assert longer is not None
    assert longer.numbers_VS[:, :6].tolist() == drawn.numbers_VS.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.5}, "decode.temperature"),
        ({"temperature": float("nan")}, "decode.temperature"),
        ({"temperature": float("inf")}, "decode.temperature"),
        ({"temperature": "warm"}, "decode.temperature"),
        ({"seed": 1.5}, "decode.seed"),
        ({"temperature": 0.0, "seed": 3}, "seed: got 3, but at temperature: 0 nothing is drawn"),
        ({"max_tokens": 1}, "temperature: got 1.0, but with max_tokens: 1 the state before"),
    ],
)
def test_draws_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(Path("-"), **options)
