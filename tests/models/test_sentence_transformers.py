"""Folders as sentence-transformers saves them, and what they say against what it computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedjob.config.job_file import recipe_from
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ModelError
from embedjob.models.sentence_transformers import folder_layer
from tests.encoder import tiny

MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
TEXTS = ["The quick brown fox", "a", "It is fine, don't you think? " * 9, "Zürich {x}", "a b c"]


def layout(
    directory: Path, name: str, pooling: dict[str, Any], *, modules: tuple[str, ...] = ()
) -> Path:
    """A tiny model in the layout that published models have, with further modules after it."""
    tiny.save(name, directory)
    kinds = ["Transformer", "Pooling", *modules]
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write(directory / "modules.json", entries)
    write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    write(directory / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})
    return directory


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def encoder(directory: Path, role: str = "symmetric") -> Encoder:
    found = folder_layer(directory)
    keys = {**found["encoder"], **found["roles"].get(role, {})}
    recipe = recipe_from({"model": str(directory), "dtype": "float32", "role": role, **keys}, {})
    return Encoder.from_recipe(recipe, device="cpu")


def agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["bert", "distilbert", "qwen3"])
@pytest.mark.parametrize("mode", [*MODES, MODES, ["lasttoken", "cls"]], ids=str)
def test_each_pooling_gives_their_vectors(name: str, mode: Any, tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer
    modules = ("Normalize",) if mode == "mean" else ()
    folder = layout(tmp_path / "model", name, {"pooling_mode": mode}, modules=modules)
    expected = theirs(str(folder), device="cpu").encode(TEXTS)
    assert agree(encoder(folder).encode(TEXTS), expected)


def test_old_folders_name_their_pooling_by_flags(tmp_path: Path) -> None:
    folder = layout(tmp_path / "model", "bert", {"pooling_mode_cls_token": True})
    found = folder_layer(folder)
    assert found == {
        "encoder": {
            "attention": "bidirectional",
            "finish": [],
            "layer": -1,
            "span": "first_token",
            "pooling": "mean",
            "max_tokens": 40,
        },
        "roles": {},
    }


def test_prompts_become_templates_by_role(tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer
    folder = layout(tmp_path / "model", "bert", {"pooling_mode": "mean"})
    prompts = {"query": "Query {q}: ", "passage": "Doc: ", "other": "Other: "}
    write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": "other", "similarity_fn_name": "dot"},
    )
    found = folder_layer(folder)
    assert found["encoder"]["similarity"] == "dot"
    assert found["encoder"]["templates"] == ["Other: {text}"]
    model = theirs(str(folder), device="cpu")
    for role, name in (("query", "query"), ("document", "passage"), ("symmetric", "other")):
        expected = model.encode(TEXTS, prompt_name=name)
        assert agree(encoder(folder, role).encode(TEXTS), expected), role


@pytest.mark.parametrize(
    ("modules", "configs", "message"),
    [
        (("WordWeights",), [{}], "the module WordWeights, .* not available"),
        (("Dense",), [{"in_features": 32, "out_features": 8}], "2_Dense has no weights"),
        (("Dense",), [{"in_features": 32}], "got out_features None"),
        (("Dense",), [{"activation_function": "mine.Swish"}], "activation_function mine.Swish"),
        (("Dense",), [{"module_input_name": "token_embeddings"}], "over single tokens"),
        (("LayerNorm",), [{"dimension": 16}], "takes vectors 16 wide, but they are 32"),
        (("Normalize",), [{"module_output_name": "other"}], "got module_output_name other"),
    ],
)
def test_modules_that_cannot_be_run_are_refused(
    modules: tuple[str, ...], configs: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    folder = layout(tmp_path / "model", "bert", {"pooling_mode": "mean"}, modules=modules)
    for number, (module, config) in enumerate(zip(modules, configs, strict=True), start=2):
        write(folder / f"{number}_{module}" / "config.json", config)
    with pytest.raises(ModelError, match=message):
        encoder(folder)


@pytest.mark.parametrize("mode", [*MODES, ["max", "cls", "weightedmean"]], ids=str)
@pytest.mark.parametrize(("name", "prompt"), [("bert", "find it:"), ("qwen3", "find: ")])
def test_a_prompt_may_be_read_and_not_pooled(
    mode: Any, name: str, prompt: str, tmp_path: Path
) -> None:
    """Where its last token merges with the text's first, they count by tokens, and so do we."""
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer
    pooling = {"pooling_mode": mode, "include_prompt": False}
    folder = layout(tmp_path / "model", name, pooling)
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": prompt}})
    model, texts = theirs(str(folder), device="cpu"), ["The fox", " a b c " * 20, " Zürich"]
    assert agree(encoder(folder, "query").encode(texts), model.encode(texts, prompt_name="query"))
    assert agree(encoder(folder).encode(texts), model.encode(texts))


def test_a_prompt_that_ends_in_a_special_token_is_refused_where_it_is_left_out(
    tmp_path: Path,
) -> None:
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    folder = layout(tmp_path / "model", "bert", pooling)
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "find [SEP]"}})
    with pytest.raises(ModelError, match="counts as the tokenizer's own"):
        folder_layer(folder)


def test_lower_case_is_left_to_a_tokenizer_that_does_it(tmp_path: Path) -> None:
    settings = {"max_seq_length": 40, "do_lower_case": True}
    folder = layout(tmp_path / "bert", "bert", {"pooling_mode": "mean"})
    write(folder / "sentence_bert_config.json", settings)
    assert folder_layer(folder)["encoder"]["max_tokens"] == 40
    folder = layout(tmp_path / "qwen3", "qwen3", {"pooling_mode": "mean"})
    write(folder / "sentence_bert_config.json", settings)
    with pytest.raises(ModelError, match="do_lower_case"):
        folder_layer(folder)


def test_a_chat_template_around_every_text_is_refused(tmp_path: Path) -> None:
    folder = layout(tmp_path / "qwen3", "qwen3", {"pooling_mode": "lasttoken"})
    how = {"method": "forward", "method_output_name": "last_hidden_state"}
    write(folder / "sentence_bert_config.json", {"modality_config": {"text": how}})
    assert folder_layer(folder)["encoder"]["span"] == "last_token"
    settings = {"modality_config": {"text": how, "message": {**how, "format": "flat"}}}
    write(folder / "sentence_bert_config.json", settings)
    with pytest.raises(ModelError, match=r"chat template.*write that template into encoder"):
        folder_layer(folder)


def test_a_transformer_one_level_down_is_found(tmp_path: Path) -> None:
    folder = layout(tmp_path / "model", "bert", {"pooling_mode": "mean"})
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).rename(folder / "0_Transformer" / name)
    (folder / "sentence_bert_config.json").rename(
        folder / "0_Transformer" / "sentence_bert_config.json"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write(folder / "modules.json", modules)
    plain = layout(tmp_path / "plain", "bert", {"pooling_mode": "mean"})
    assert folder_layer(folder) == folder_layer(plain)
    assert agree(encoder(folder).encode(TEXTS), encoder(plain).encode(TEXTS))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_plain_folder_tells_only_its_kind_and_its_limit(name: str, tmp_path: Path) -> None:
    found = folder_layer(tiny.save(name, tmp_path / name))
    limits = {"t5": None, "roberta": 78, "mpnet": 78}
    expected: dict[str, Any] = {} if name in tiny.DECODERS else {"attention": "bidirectional"}
    if limits.get(name, 80):
        expected["max_tokens"] = limits.get(name, 80)
    assert found == {"encoder": expected, "roles": {}}
    text = "the lazy dog " * 99
    assert np.isfinite(encoder(tmp_path / name).encode([text])).all()
