"""Weights in several files, heads and added tokens: loaded whole or refused.

Covers: embedjob.models.checkpoint
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from embedjob.config.recipe import Recipe, SpecialTokens
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.loading import load_model
from embedjob.errors import ModelError
from embedjob.models.architecture import model_info
from embedjob.models.digests import file_digests
from embedjob.models.source import ModelSource, materialize
from embedjob.models.tokenizer import load_tokenizer
from embedjob.storage import objects
from tests.encoder import tiny

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 17, 3, 44]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The tiny Llama in several files and their index."""
    folder = tiny.save("llama", tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    tiny.model("llama").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def recipe(folder: Path | str, **knobs: object) -> Recipe:
    return Recipe(**{"model": str(folder), "max_tokens": 40, "dtype": "float32", **knobs})


def states(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).last_hidden_state
    return found


def test_shards_are_one_model(shards: Path) -> None:
    whole = tiny.model("llama").base_model
    assert torch.equal(states(load_model(recipe(shards), device=CPU).model), states(whole))
    source = ModelSource(str(shards))
    assert model_info(source).parameters == tiny.model("llama").num_parameters()
    names = {path.name for path in shards.glob("model-*.safetensors")}
    assert set(file_digests(source)) == {"config.json", "tokenizer.json", *names}


ASKS: list[Callable[[ModelSource], object]] = [model_info, file_digests, materialize]


@pytest.mark.parametrize("ask", ASKS)
def test_a_missing_shard_is_named_before_anything_is_loaded(
    shards: Path, ask: Callable[[ModelSource], object]
) -> None:
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of the shards .*{gone.name}.*cut short"):
        ask(ModelSource(str(shards)))


def test_shards_without_their_index_are_refused(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"shards and no model\.safetensors\.index\.json"):
        model_info(ModelSource(str(shards)))


def test_a_shard_that_was_cut_short_is_refused(shards: Path) -> None:
    last = sorted(shards.glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(ModelError, match=rf"{last.name}: has \d+ bytes, and its header says"):
        model_info(ModelSource(str(shards)))


def test_shards_in_s3_are_brought_whole_or_not_at_all(shards: Path, bucket: str) -> None:
    for path in shards.iterdir():
        objects.create(f"{bucket}/m/{path.name}", path.read_bytes())
    there = ModelSource(f"{bucket}/m")
    assert file_digests(there) == file_digests(ModelSource(str(shards)))
    found = load_model(recipe(f"{bucket}/m"), device=CPU).model
    assert torch.equal(states(found), states(tiny.model("llama").base_model))
    gone = sorted(shards.glob("model-*.safetensors"))[0].name
    objects.delete(f"{bucket}/m/{gone}")
    for ask in ASKS:
        with pytest.raises(ModelError, match=rf"lacks 1 of the shards .*{gone}"):
            ask(there)


def with_a_head(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**tiny.GROUPED, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("headless", [True, False])
def test_the_head_does_not_matter_tied_or_not_saved_or_not(
    tmp_path: Path, tied: bool, headless: bool
) -> None:
    whole = with_a_head(tied=tied)
    (whole.base_model if headless else whole).save_pretrained(tmp_path)
    found = load_model(recipe(tmp_path), device=CPU).model
    assert torch.equal(states(found), states(whole.base_model))


def only_the_head(folder: Path) -> dict[str, Tensor]:
    """What some converters leave of two tied tensors: the first by name."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("model.embed_tokens.weight")
    return {**tensors, "lm_head.weight": head}


def test_a_tied_head_saved_in_place_of_the_embeddings_is_taken(tmp_path: Path) -> None:
    whole = with_a_head(tied=True)
    whole.save_pretrained(tmp_path)
    save_file(only_the_head(tmp_path), tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_model(recipe(tmp_path), device=CPU).model
    assert torch.equal(states(found), states(whole.base_model))


def test_an_untied_head_is_no_embedding(tmp_path: Path) -> None:
    with_a_head(tied=False).save_pretrained(tmp_path)
    save_file(only_the_head(tmp_path), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors of LlamaModel \(embed_tokens\.weight"):
        load_model(recipe(tmp_path), device=CPU)


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A checkpoint with two tokens, and rows for them, that its base did not have."""
    folder = tiny.save("llama", tmp_path / "extended")
    model, tokenizer = tiny.model("llama"), tiny.tokenizer("llama")
    tokenizer.add_special_tokens([f"<filler{n}>" for n in range(600 - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens(["<s1>", "<s2>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(5)
    model.resize_token_embeddings(602, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[600:].normal_()
    model.save_pretrained(folder)
    return folder


def test_extra_tokens_have_their_rows(extended: Path) -> None:
    template = {
        "template": [{"text": {}}, {"special": "<s1>", "pool": True}, {"special": "<s2>"}],
        "join": "separate",
    }
    one = Recipe.model_validate_json(
        json.dumps({**recipe(extended).model_dump(), "templates": [template], "span": "pooled"})
    )
    views = load_tokenizer(one).views(["a fox"])
    assert views.full_ids(0).tolist()[-2:] == [600, 601]
    found = Encoder.from_recipe(one, device="cpu").encode(["a fox"])
    rows = load_file(extended / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (602, 32)
    model = load_model(one, device=CPU).model
    with torch.inference_mode():
        ids = torch.tensor([views.full_ids(0).astype(int).tolist()])
        state = model(input_ids=ids).last_hidden_state[0, -2]
    torch.testing.assert_close(torch.from_numpy(found[0]), state / state.norm())


def test_a_token_is_added_only_where_it_has_a_row(extended: Path) -> None:
    def adding(*tokens: str) -> Recipe:
        return recipe(extended, special_tokens=SpecialTokens(add=tokens))

    load_tokenizer(adding("<s1>", "<s2>"))
    said = r"add: got '<s3>', which would be token 602 of .*embeds 602 tokens only; allowed are"
    with pytest.raises(ModelError, match=said):
        load_tokenizer(adding("<s1>", "<s3>"))
    # Many checkpoints have rows to spare, for tokens that come later.
    model = tiny.model("llama")
    model.resize_token_embeddings(640, mean_resizing=False)
    model.save_pretrained(extended)
    load_tokenizer(adding("<s1>", "<s3>"))
