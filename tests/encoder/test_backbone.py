"""The backbone: states of the plain model, in either direction of attention.

Covers: embedjob.encoder.attention.direction
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.errors import ModelError
from tests.encoder import tiny

IDS = [[5, 9, 17, 3, 44, 8, 120], [7, 6, 33], [200]]
CPU = torch.device("cpu")


def inner(name: str) -> torch.nn.Module:
    """The model without its head, as AutoModel would load it."""
    model = tiny.model(name)
    return model.base_model if name in tiny.DECODERS else model


def backbone(name: str, attention: str | None = None) -> Backbone:
    own = "causal" if name in tiny.DECODERS else "bidirectional"
    return Backbone(inner(name), attention=attention or own)


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 1), torch.zeros(len(rows), longest)
    for row, values in enumerate(rows):
        where = slice(longest - len(values), None) if side == "left" else slice(len(values))
        ids[row, where], mask[row, where] = torch.tensor(values), 1
    return ids, mask.bool()


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / other.norm()) <= 1e-4


@pytest.mark.parametrize("layer", [-1, 1, 0, (1, -1)])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_view_has_the_same_states_alone_and_in_any_batch(
    name: str, layer: int | tuple[int, ...]
) -> None:
    model = backbone(name)
    alone = [
        model.states(torch.tensor([row]), torch.ones(1, len(row)).bool(), layer=layer)[0]
        for row in IDS
    ]
    for side in ("right", "left"):
        ids, mask = padded(IDS, side)
        states = model.states(ids, mask, layer=layer)
        for row, expected in enumerate(alone):
            assert close(states[row][mask[row]], expected), (name, side, row)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_states_are_those_of_the_plain_model(name: str) -> None:
    ids = torch.tensor([IDS[0]])
    with torch.inference_mode():
        expected = inner(name)(input_ids=ids).last_hidden_state
    assert close(backbone(name).states(ids, torch.ones_like(ids).bool(), layer=-1), expected)


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_a_bidirectional_decoder_is_so_alone_and_padded_on_either_side(name: str) -> None:
    model = backbone(name, "bidirectional")
    changed = [[*IDS[0][:2], 50, *IDS[0][3:]], *IDS[1:]]
    alone = [
        model.states(torch.tensor([r]), torch.ones(1, 7).bool(), layer=-1)[0]
        for r in (IDS[0], changed[0])
    ]
    assert not close(alone[0][0], alone[1][0])
    for side in ("right", "left"):
        rows = [model.states(*padded(rows, side), layer=-1)[0] for rows in (IDS, changed)]
        assert close(rows[0], alone[0])
        assert close(rows[1], alone[1])


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_a_causal_decoder_never_looks_ahead(name: str) -> None:
    model = backbone(name)
    changed = [[*IDS[0][:3], 50, *IDS[0][4:]], *IDS[1:]]
    for rows in (IDS[:1], IDS):
        before = model.states(*padded(rows, "right"), layer=-1)[0]
        after = model.states(*padded([changed[0], *rows[1:]], "right"), layer=-1)[0]
        assert torch.equal(before[:3], after[:3])
        assert not close(before[3:], after[3:])


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "t5"])
def test_an_encoder_cannot_be_causal(name: str) -> None:
    with pytest.raises(
        ModelError,
        match=r"encoder.attention: got causal.*sees later.*set encoder.attention: bidirectional",
    ):
        backbone(name, "causal")


def test_layers_are_those_of_hidden_states_with_the_last_one_normed() -> None:
    raw = inner("llama")
    ids = torch.tensor([IDS[0]])
    with torch.inference_mode():
        output = raw(input_ids=ids, output_hidden_states=True)
    model = backbone("llama")
    mask = torch.ones_like(ids).bool()

    def states(layer: int | tuple[int, ...]) -> Tensor:
        return model.states(ids, mask, layer=layer)

    torch.testing.assert_close(states(-1), output.last_hidden_state)
    torch.testing.assert_close(states(2), output.last_hidden_state)
    torch.testing.assert_close(states(-2), output.hidden_states[1])
    torch.testing.assert_close(states(0), raw.get_input_embeddings()(ids))
    torch.testing.assert_close(states((1, -1)), (states(1) + states(-1)) / 2)


def test_float32_is_a_visit_from_which_bfloat16_returns_to_the_bit() -> None:
    model = Backbone(inner("llama").to(torch.bfloat16), attention="causal")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    rotary = model.model.rotary_emb.inv_freq.clone()
    ids, mask = padded(IDS, "right")
    narrow = model.states(ids, mask, layer=-1)
    with model.float32():
        assert model.states(ids, mask, layer=-1).dtype == torch.float32
    assert torch.equal(model.states(ids, mask, layer=-1), narrow)
    assert all(torch.equal(before[name], now) for name, now in model.model.state_dict().items())
    assert torch.equal(model.model.rotary_emb.inv_freq, rotary)


def test_weights_that_cannot_all_be_widened_are_left_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Backbone(inner("llama").to(torch.bfloat16), attention="causal")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    last = model.model.layers[1].mlp.down_proj.weight
    widen, widened = Tensor.float, []

    def scarce(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == last.data_ptr():
            raise torch.OutOfMemoryError("CUDA out of memory")
        widened.append(tensor.numel())
        return widen(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "float", scarce)
        with pytest.raises(torch.OutOfMemoryError), model.float32():
            raise AssertionError("it was widened all the same")
    assert len(widened) > 10
    for name, now in model.model.state_dict().items():
        assert now.dtype == torch.bfloat16, name
        assert torch.equal(before[name], now), name


def test_an_id_without_an_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match="id 600, but the model embeds only 600"):
        backbone("llama").states(torch.tensor([[600]]), torch.tensor([[True]]), layer=-1)


def test_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors.*up_proj"):
        load_backbone(Recipe(model=str(folder), max_tokens=64), device=CPU)


def test_pickled_weights_give_the_same_states_where_allowed(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    recipe = Recipe(model=str(folder), max_tokens=64, allow_pickle=True)
    ids, mask = padded(IDS, "right")
    expected = load_backbone(recipe, device=CPU).states(ids, mask, layer=-1)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_backbone(recipe, device=CPU).states(ids, mask, layer=-1), expected)
    with pytest.raises(ModelError, match="allow_pickle"):
        load_backbone(Recipe(model=str(folder), max_tokens=64), device=CPU)


def test_a_broken_weight_file_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_backbone(Recipe(model=str(folder), max_tokens=64), device=CPU)
