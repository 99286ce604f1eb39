"""Interventions in every kind of decoder, against one view at a time with the method replaced."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CTRLConfig, CTRLModel

from embedjob.config.interventions import INTERVENTIONS, Prepend, Prepending
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.intervention_hooks import INSTALL
from embedjob.errors import ModelError
from embedjob.models.architecture import check_model
from embedjob.text.views import TokenViews
from tests.encoder import tiny
from tests.encoder.steering import (
    AT,
    BESIDE,
    BOTH,
    PREFIX,
    ROW_SEED,
    SLOT,
    WAYS,
    backbone,
    inner,
    recipe,
    texts,
    views,
)

BLOCKS = {"gpt2": "h", "neox": "layers", "opt": "decoder.layers"}
PROJECTIONS = {"gpt2": "attn.c_proj", "neox": "attention.dense", "opt": "self_attn.out_proj"}


def test_each_kind_of_intervention_has_its_hooks() -> None:
    kinds = INTERVENTIONS.items()
    assert INSTALL.keys() == {kind.section.model_fields[key].annotation for key, kind in kinds}


@contextmanager
def replaced(module: nn.Module, make: Callable[[Any], Any]) -> Iterator[None]:
    module.forward = make(module.forward)
    try:
        yield
    finally:
        del module.forward


def projecting(taken: list[Tensor], alpha: float) -> Callable[[Any], Any]:
    """The second time the last token has what is left of the first time's values."""

    def make(forward: Any) -> Any:
        def changed(values: Tensor) -> Tensor:
            taken.append(values[0, -1].clone())
            if len(taken) == 2:
                values[0, -1] = alpha * (taken[1] - taken[0])
            return forward(values)

        return changed

    return make


def embedding(forward: Any) -> Any:
    drawn = np.random.RandomState(ROW_SEED).standard_normal(32).astype(np.float32)

    def changed(ids: Tensor) -> Tensor:
        states = forward(torch.where(ids == SLOT, 0, ids))
        states[ids == SLOT] = torch.from_numpy(drawn)
        return states

    return changed


def entering(forward: Any) -> Any:
    def changed(*args: Tensor, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        states[0, AT] = states[0, -1]
        return forward(*args, **kwargs)

    return changed


@torch.inference_mode()
def reference(name: str, row: int, *, alpha: float | None = 1.5) -> Tensor:
    """The last state of one view, by whole runs of a fresh model."""
    model, taken, text = inner(name), [], texts()[row]
    blocks = model.get_submodule(BLOCKS.get(name, "layers"))
    embeds = model.get_input_embeddings()
    with ExitStack() as stack:
        if alpha:
            projection = blocks[0].get_submodule(PROJECTIONS.get(name, "self_attn.o_proj"))
            stack.enter_context(replaced(projection, projecting(taken, alpha)))
            model(input_ids=torch.tensor([[*BESIDE, *text, 6, 7]]))
        stack.enter_context(replaced(embeds, embedding))
        stack.enter_context(replaced(blocks[1], entering))
        ids = torch.tensor([[*PREFIX[:AT], SLOT, *PREFIX[AT + 1 :], *text, 5]])
        states: Tensor = model(input_ids=ids).last_hidden_state
    return states[0, -1]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    error = np.abs(one - other).max() / np.abs(other).max()
    return bool(((one * other).sum(axis=1) / norms >= 0.99999).all() and error <= 1e-4)


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_states_are_steered_alike_in_any_batch_and_decoder(name: str) -> None:
    expected = torch.stack([reference(name, row) for row in range(len(texts()))]).numpy()
    for side, budget in WAYS:
        encoder = Encoder(
            backbone(name), recipe(*BOTH), tokens_per_microbatch=budget, padding_side=side
        )
        encoded = encoder.encode_views(views())
        assert not encoded.failed
        assert same(encoded.embeddings, expected), (side, budget)
    plain = Encoder(backbone(name), recipe(BOTH[0]))
    alone = torch.stack([reference(name, row, alpha=None) for row in range(len(texts()))])
    found = plain.encode_views(views(contrasted=False)).embeddings
    assert same(found, alone.numpy())
    assert not same(found, expected)


def test_what_comes_before_the_slot_is_run_once() -> None:
    encoder = Encoder(backbone("llama"), recipe(*BOTH))
    stats = encoder.encode_views(views()).stats
    own = sum(len(PREFIX) - AT + len(text) + 1 for text in texts())
    # The auxiliary prefix is run once as well; its views stop at the first block.
    assert stats["forward_tokens"] == own + AT + len(BESIDE)


def test_the_auxiliary_run_ends_where_it_is_captured() -> None:
    made = Backbone(inner("llama"), attention="causal")
    encoder = Encoder(made, recipe(BOTH[1]), tokens_per_microbatch=1000)
    encoder.encode_views(views_without_slot())
    assert made.blocks is not None
    runs: list[int] = []
    for number, block in enumerate(made.blocks):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    encoded = encoder.encode_views(views_without_slot())
    # Of the auxiliary runs, that end within it, not one has left the second block.
    assert runs == [0, 1] * int(encoded.stats["microbatches"])


def views_without_slot() -> TokenViews:
    found = views()
    ids = np.where(found.ids == SLOT, 9, found.ids).astype(np.uint32)
    return TokenViews(**{**vars(found), "ids": ids, "slots": ()})


def test_a_view_is_rescued_in_float32_with_its_interventions() -> None:
    model = inner("llama").bfloat16()
    encoder = Encoder(Backbone(model, attention="causal"), recipe(*BOTH))
    precise = Encoder(
        Backbone(inner("llama").bfloat16().float(), attention="causal"), recipe(*BOTH)
    )

    def refuse(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if next(module.parameters()).dtype == torch.bfloat16:
            raise IndexError("not in bfloat16")

    encoder.encode_views(views())
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    encoded = encoder.encode_views(views())
    assert not encoded.failed
    assert same(encoded.embeddings, precise.encode_views(views()).embeddings)


def test_equal_views_with_unlike_auxiliary_ones_are_not_taken_for_one() -> None:
    one = views().take([1, 1])
    assert one.auxiliary is not None
    ids = one.auxiliary.ids.copy()
    ids[-3] += 1
    beside = TokenViews(**{**vars(one.auxiliary), "ids": ids})
    unlike = TokenViews(**{**vars(one), "auxiliary": beside})
    encoder = Encoder(backbone("llama"), recipe(*BOTH))
    same_twice, apart = encoder.encode_views(one), encoder.encode_views(unlike)
    assert same_twice.stats["distinct_views"] == 1
    assert apart.stats["distinct_views"] == 2
    assert not np.allclose(apart.embeddings[0], apart.embeddings[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("interventions", "layer", "said"),
    [
        (BOTH[:1], 1, r"prepend\.start: got 1, allowed is at most 0"),
        ((Prepending(prepend=Prepend(slot="x", start=0, exit=3)),), -1, r"prepend\.exit: got 3"),
        (BOTH[1:], (0, -1), r"contrast\.layer: got 0, allowed is at most -1"),
    ],
)
def test_blocks_that_change_nothing_are_refused(
    interventions: tuple[Any, ...], layer: Any, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        check_model(recipe(*interventions, layer=layer), backbone("llama").info)


def test_an_architecture_whose_projection_is_not_known_is_refused() -> None:
    sizes = {"vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64}
    model = CTRLModel(CTRLConfig(**sizes)).eval()
    with pytest.raises(ModelError, match=r"contrast: a block of CTRLModel has none of"):
        Encoder(Backbone(model, attention="causal"), recipe(BOTH[1]))
