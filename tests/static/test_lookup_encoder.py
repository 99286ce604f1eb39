"""Static tables against sentence-transformers and model2vec, and what is refused of them.

Covers: embedjob.models.tables.static_tables
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.measuring.glove import glove_table
from embedjob.config.job_file import job_source
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, InputError, InterruptedRunError, ModelError
from embedjob.job.resolve import identify, resolve, resolve_encoder
from embedjob.models.tables.word_tables import read_table
from embedjob.models.tokenizer import load_tokenizer
from embedjob.static.lookup_encoder import LookupEncoder

SENTENCE = "the quick brown fox jumps over lazy dog a of to and in is it"
WORDS = [*SENTENCE.split(), "U.S.", "'s", "Fox"]
WIDTH = 12
VECTORS = np.random.default_rng(5).normal(size=(len(WORDS), WIDTH)).astype(np.float32)
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "fox",
    "Fox, FOX and fox! (the U.S.)",
    "unknown words and a dog",
    "the " * 700,
    "it is\n\tin the U.S.\u2003to  it",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    """A table in the format of GloVe."""
    path = tmp_path / "glove.txt"
    path.write_text(
        "".join(
            f"{word} {' '.join(np.format_float_positional(x) for x in vector)}\n"
            for word, vector in zip(WORDS, VECTORS, strict=True)
        )
    )
    return path


def tokenizer() -> Tokenizer:
    """A tokenizer of words, with an unknown token."""
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


ROWS = np.vstack([VECTORS[:1] * 0 + 3, VECTORS])


def encoder(model: Path, **keys: Any) -> Encoder:
    return Encoder.from_config({"model": str(model), **keys}, device="cpu")


@pytest.mark.parametrize("left_out", [(), ("the", "is", "of")])
def test_a_folder_of_word_embeddings_equals_sentence_transformers(
    left_out: tuple[str, ...], glove: Path, tmp_path: Path
) -> None:
    words = WordEmbeddings.from_text_file(
        str(glove), tokenizer=WhitespaceTokenizer(stop_words=left_out)
    )
    theirs = SentenceTransformer(modules=[words, Pooling(WIDTH)], device="cpu")
    theirs.save(str(tmp_path / "folder"))
    texts = TEXTS if not left_out else TEXTS[:4]
    expected = theirs.encode(texts)
    assert np.abs(encoder(tmp_path / "folder").encode(texts) - expected).max() < 1e-6
    assert encoder(tmp_path / "folder").recipe.finish == ()


def test_a_bare_table_equals_word_embeddings_without_stop_words(glove: Path) -> None:
    words = WordEmbeddings.from_text_file(str(glove), tokenizer=WhitespaceTokenizer(stop_words=()))
    theirs = SentenceTransformer(modules=[words, Pooling(WIDTH), Normalize()], device="cpu")
    assert np.abs(encoder(glove).encode(TEXTS) - theirs.encode(TEXTS)).max() < 1e-6
    raw = SentenceTransformer(modules=[words, Pooling(WIDTH)], device="cpu").encode(TEXTS)
    assert np.abs(encoder(glove, finish=[]).encode(TEXTS) - raw).max() < 1e-6


@pytest.mark.parametrize("normalized", [False, True])
def test_a_folder_of_static_embedding_equals_sentence_transformers(
    normalized: bool, tmp_path: Path
) -> None:
    steps = [Normalize()] if normalized else []
    table = StaticEmbedding(tokenizer(), embedding_weights=ROWS)
    theirs = SentenceTransformer(modules=[table, *steps], device="cpu")
    theirs.save(str(tmp_path / "folder"))
    ours = encoder(tmp_path / "folder")
    assert_equal(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.recipe.normalized is normalized


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """To 1e-6; 700 equal rows are added in float32 in another order: a digit less."""
    apart = np.abs(ours - theirs).max(axis=1)
    assert (apart < np.where(np.array(TEXTS) == TEXTS[4], 1e-5, 1e-6)).all(), apart


def save_model2vec(folder: Path, config: dict[str, Any], **tensors: np.ndarray) -> Path:
    folder.mkdir()
    save_file({"embeddings": ROWS, **tensors}, folder / "model.safetensors")
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", **config}))
    return folder


@pytest.mark.parametrize("config", [{}, {"normalize": True, "max_length": 40}])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder_of_model2vec_equals_model2vec(
    config: dict[str, Any], quantized: bool, tmp_path: Path
) -> None:
    static_model = pytest.importorskip("model2vec").StaticModel
    mapping = np.arange(len(ROWS), dtype=np.int64)[::-1].copy()
    weights = np.linspace(0.5, 2, len(ROWS), dtype=np.float32)
    tensors = {"mapping": mapping, "weights": weights} if quantized else {}
    folder = save_model2vec(tmp_path / "folder", config, **tensors)
    theirs = static_model.from_pretrained(folder)
    assert_equal(encoder(folder).encode(TEXTS), theirs.encode(TEXTS))


def test_model2vec_leaves_the_unknown_token_out(tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "folder", {})
    ours = encoder(folder)
    assert np.allclose(ours.encode(["the xyz fox"]), (VECTORS[0] + VECTORS[3]) / 2, atol=1e-6)
    with pytest.raises(InputError, match="empty_span, no token of the text has a vector"):
        ours.encode(["the", "xyz"])
    views = load_tokenizer(ours.recipe).views(["xyz", "the xyz"])
    assert views.span.tolist() == [[0, 0], [0, 1]]
    assert load_tokenizer(ours.recipe).tokens(views.ids.tolist()) == ["the"]


def test_a_text_is_cut_after_the_tokens_that_the_folder_says(tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "folder", {"max_length": 3})
    ours = encoder(folder)
    views = load_tokenizer(ours.recipe).views(["the fox jumps over", "the fox jumps"])
    assert views.lengths.tolist() == [3, 3]
    assert views.truncated.tolist() == [True, False]
    with pytest.raises(InputError, match="no token"):
        encoder(folder, max_tokens=1).encode(["xyz fox"])


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "folder", {})
    save_file({"embeddings": ROWS[:-1]}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="has 19 tokens and 18 vectors"):
        identify(resolve(job_source(job(folder, tmp_path))))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is no tokenizer"):
        identify(resolve(job_source(job(folder, tmp_path))))


def test_a_text_without_a_word_of_the_table_has_no_embedding(glove: Path) -> None:
    with pytest.raises(InputError, match="2 of 3 texts cannot be embedded; the first is number 1"):
        encoder(glove).encode(["the", "", "xyz abc"])


def test_many_texts_give_what_each_gives_alone(
    glove: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = np.vstack([encoder(glove).encode([text]) for text in TEXTS])
    monkeypatch.setattr("embedjob.static.lookup_encoder._NUMBERS_AT_ONCE", WIDTH * 9)
    assert np.array_equal(encoder(glove).encode(TEXTS), alone)
    assert np.array_equal(encoder(glove).encode(TEXTS[::-1]), alone[::-1])


def test_a_run_that_stops_is_left_between_two_blocks(glove: Path) -> None:
    recipe = resolve_encoder({"model": str(glove)}, on_gpu=False).recipe
    views = load_tokenizer(recipe).views(TEXTS)
    told: list[tuple[int, int]] = []
    made = LookupEncoder(recipe).encode_views(views, on_progress=lambda *one: told.append(one))
    assert told[-1] == (len(TEXTS), int(views.lengths.sum()))
    assert not made.failed
    with pytest.raises(InterruptedRunError, match="between two blocks"):
        LookupEncoder(recipe).encode_views(views, stop=lambda: True)


REFUSED = {
    "layer": (-2, "layer: got -2, but .* is a static table, in which words are"),
    "templates": (['This sentence: "{text}" means'], "templates: got .*; allowed is .*{text}"),
    "attention": ("causal", "attention: got causal.*allowed is bidirectional"),
    "pooling": ("max", "pooling: got max.*allowed is mean"),
    "aggregation": ("concat", "aggregation: got concat"),
    "span": ("last_token", "span: got last_token"),
    "heads": ([{"pooler": True}], "heads: got .*allowed is none"),
    "long_text": ("chunk_mean", "long_text: got chunk_mean.*allowed is truncate"),
    "quantize": ("int8", "quantize: got int8"),
    "dtype": ("bfloat16", "dtype: got bfloat16.*allowed is float32"),
    "word_cut": (10, "word_cut: got 10"),
    "prepare": ("eol", "prepare: got eol"),
    "special_tokens": ({"eos": "append", "eos_id": 1}, "special_tokens: got .*eos='append'"),
}


def job(model: Path, tmp_path: Path, **encoder: Any) -> dict[str, Any]:
    return {
        "input": {"path": str(tmp_path), "text": "body"},
        "encoder": {"model": str(model), **encoder},
        "output": {"path": str(tmp_path / "out")},
    }


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_mean_nothing_for_a_table_are_refused(
    key: str, glove: Path, tmp_path: Path
) -> None:
    value, said = REFUSED[key]
    with pytest.raises(ModelError, match=f"encoder.{said}"):
        identify(resolve(job_source(job(glove, tmp_path, **{key: value}))))


def test_a_table_takes_no_gpu(glove: Path, tmp_path: Path) -> None:
    document = job(glove, tmp_path)
    identified = identify(resolve(job_source(document)))
    assert identified.config.pool.gpus_per_actor == 0
    assert identified.config.encoder.dtype == "float32"
    assert (identified.width, identified.model.layers) == (WIDTH, 0)
    with pytest.raises(ConfigError, match=r"pool\.gpus_per_actor: got 1, but .* set it to 0"):
        resolve(job_source({**document, "pool": {"gpus_per_actor": 1}}))


def test_the_fingerprint_changes_with_a_number_of_the_table_and_not_with_its_place(
    glove: Path, tmp_path: Path
) -> None:
    first = identify(resolve(job_source(job(glove, tmp_path))))
    (tmp_path / "moved").mkdir()
    copy = tmp_path / "moved" / "glove.txt"
    copy.write_bytes(glove.read_bytes())
    assert identify(resolve(job_source(job(copy, tmp_path)))).fingerprint == first.fingerprint
    assert list(first.digests) == ["glove.txt"]
    copy.write_text(copy.read_text().replace("fox -", "fox ", 1))
    assert identify(resolve(job_source(job(copy, tmp_path)))).fingerprint != first.fingerprint


def test_the_words_of_a_folder_are_part_of_its_digests(glove: Path, tmp_path: Path) -> None:
    words = WordEmbeddings.from_text_file(str(glove))
    SentenceTransformer(modules=[words, Pooling(WIDTH)], device="cpu").save(str(tmp_path / "f"))
    digests = identify(resolve(job_source(job(tmp_path / "f", tmp_path)))).digests
    assert {Path(name).name for name in digests} >= {
        "model.safetensors",
        "whitespacetokenizer_config.json",
        "wordembedding_config.json",
    }


def test_a_table_with_nan_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[5, 2] = np.nan
    folder = save_model2vec(tmp_path / "folder", {})
    save_file({"embeddings": rows}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="not finite in row 5 of 19; give a table without NaN"):
        identify(resolve(job_source(job(folder, tmp_path))))


DAMAGED = {
    "cut short": (lambda data: data[:-50], "bytes, and its header says"),
    "no safetensors": (lambda data: b"nothing", "cannot be read as safetensors"),
    "empty": (lambda data: b"", "cannot be read as safetensors"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_folder_is_refused(how: str, tmp_path: Path) -> None:
    damage, said = DAMAGED[how]
    folder = save_model2vec(tmp_path / "folder", {})
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=said):
        resolve(job_source(job(folder, tmp_path)))


def test_other_tensors_and_a_table_without_rows_are_refused(tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "folder", {})
    save_file({"weight": ROWS}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="has weight; allowed is a table under"):
        resolve(job_source(job(folder, tmp_path)))
    save_file({"embeddings": ROWS[:0]}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has the shape \[0, 12\]; allowed is one row"):
        resolve(job_source(job(folder, tmp_path)))


def test_modules_after_the_table_that_are_not_averages_are_refused(
    glove: Path, tmp_path: Path
) -> None:
    words = WordEmbeddings.from_text_file(str(glove))
    pooling = Pooling(WIDTH, pooling_mode="max")
    SentenceTransformer(modules=[words, pooling], device="cpu").save(str(tmp_path / "folder"))
    with pytest.raises(ModelError, match=r"got the pooling .*max.* over a static table"):
        resolve(job_source(job(tmp_path / "folder", tmp_path)))


def test_actors_load_a_table_without_torch_and_transformers(glove: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from embedjob.stages.engine import recipe_engine
from embedjob.job.resolve import resolve, identify
from benchmarks.measuring.glove import glove_table
from embedjob.config.job_file import job_source
job = identify(resolve(job_source({job(glove, tmp_path)!r})))
engine = recipe_engine(job.config, 1)
encoded = engine.load_encoder().encode_views(
    engine.load_tokenizer().views(["the fox", "a dog"]),
    stop=lambda: False,
    on_progress=lambda texts, tokens: None,
)
assert encoded.embeddings.shape == (2, {WIDTH})
print([name for name in ("torch", "transformers", "safetensors.torch") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_float16_rows_are_read_as_they_are(tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "folder", {})
    save_file({"embeddings": ROWS.astype(np.float16)}, folder / "model.safetensors")
    assert load_file(folder / "model.safetensors")["embeddings"].dtype == np.float16
    made = encoder(folder).encode(["fox"])
    assert np.array_equal(made[0], VECTORS[3].astype(np.float16).astype(np.float32))


@pytest.mark.slow
def test_averages_of_glove_equal_sentence_transformers() -> None:
    path = glove_table()
    if path is None:
        pytest.skip("the package that has the table is not installed")
    table = read_table(path)
    assert (len(table.words), table.vectors_VD.shape[1]) == (400_000, 50)
    words = WordEmbeddings(WhitespaceTokenizer(table.words, stop_words=()), table.vectors_VD)
    theirs = SentenceTransformer(modules=[words, Pooling(50)], device="cpu")
    texts = [*TEXTS[:4], "A man is playing a guitar.", "Iran's U.N. envoy, 3.5% up -- naïve?"]
    expected = theirs.encode(texts)
    assert np.abs(encoder(path, finish=[]).encode(texts) - expected).max() < 1e-6
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = encoder(path, method="glove").encode(texts)
    assert np.abs(found - unit).max() < 1e-6


def test_a_method_of_tables_takes_no_transformer(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="glove looks words up in a table of vectors; give a"):
        resolve(job_source(job(model, tmp_path, method="glove")))


def test_a_method_of_prompts_takes_no_table(glove: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder\.attention|encoder\.templates"):
        identify(resolve(job_source(job(glove, tmp_path, method="prompteol"))))
