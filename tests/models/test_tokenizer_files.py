"""Tokenizers are as the folder says: ids equal those of AutoTokenizer, whichever file says what."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PerceiverTokenizer
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from embedjob.config.recipe import Recipe
from embedjob.errors import ModelError
from embedjob.models.components import ModelComponents, components_of
from embedjob.models.digests import model_digests, tokenizer_digests
from embedjob.models.sentence_transformers import folder_layer
from embedjob.models.tokenizer import load_tokenizer, lowercases, read_tokenizer
from embedjob.models.tokenizer_files import note, read_files
from tests.cluster import ROOT
from tests.encoder import tiny
from tests.fakes import tiny_tokenizer

TEXTS = (
    "",
    "A Naïve café, in ZÜRICH\n  with  blanks ",
    "日本語 and Это 1234",
    " it's <new> a<new>b NEWS <made>",
    "▁x [b] </s> <s> <|endoftext|> [SEP]",
)
# A class that transformers loads from tokenizer.json, a model that has it, and a tokenizer.json of
# its family. The first ones stand for their kin, which `make slow` tries too.
FAMILIES = {
    "bert": ("BertTokenizer", "bert", "bert"),
    "llama": ("LlamaTokenizer", "llama", "llama"),
    "qwen": ("Qwen2TokenizerFast", "qwen3", "qwen"),
    "xlm-r": ("XLMRobertaTokenizer", "xlm-roberta", "xlmr"),
}
KIN = {
    "llama-3": ("PreTrainedTokenizerFast", "llama", "llama3"),
    "gpt2": ("GPT2Tokenizer", "gpt2", "gpt2"),
    "t5": ("T5TokenizerFast", "t5", "t5"),
    "deberta-v2": ("DebertaV2Tokenizer", "deberta-v2", "xlmr"),
    "gemma": ("GemmaTokenizerFast", "gemma2", "llama"),
    "bert without a class": (None, "bert", "bert"),
    "distilbert": ("DistilBertTokenizer", "distilbert", "bert"),
    "mpnet": ("MPNetTokenizer", "mpnet", "bert"),
    "electra": ("ElectraTokenizerFast", "electra", "bert"),
    "modernbert": ("PreTrainedTokenizerFast", "modernbert", "bert"),
    "funnel": ("FunnelTokenizer", "funnel", "bert"),
    "mistral": ("LlamaTokenizer", "mistral", "llama"),
    "llama by Metaspace": ("LlamaTokenizerFast", "llama", "mistral"),
    "llama by bytes": ("LlamaTokenizerFast", "llama", "llama3"),
    "code llama": ("CodeLlamaTokenizer", "llama", "llama"),
    "opt": ("GPT2Tokenizer", "opt", "opt"),
    "roberta": ("RobertaTokenizer", "roberta", "opt"),
    "neox": ("GPTNeoXTokenizer", "gpt_neox", "gpt2"),
    "bloom": ("BloomTokenizerFast", "bloom", "gpt2"),
    "qwen2": ("Qwen2Tokenizer", "qwen2", "qwen"),
    "cohere": ("CohereTokenizerFast", "cohere", "gpt2"),
    "deberta": ("DebertaTokenizer", "deberta", "gpt2"),
    "albert": ("AlbertTokenizer", "albert", "xlmr"),
    "camembert": ("CamembertTokenizer", "camembert", "xlmr"),
    "mbart": ("MBartTokenizer", "mbart", "xlmr"),
    "nllb": ("NllbTokenizer", "m2m_100", "xlmr"),
    "pegasus": ("PegasusTokenizer", "pegasus", "t5"),
    "xlnet": ("XLNetTokenizer", "xlnet", "xlmr"),
    "big bird": ("BigBirdTokenizer", "big_bird", "xlmr"),
    "rembert": ("RemBertTokenizer", "rembert", "xlmr"),
    "barthez": ("BarthezTokenizer", "mbart", "xlmr"),
    "unknown": ("NobodysTokenizer", "llama", "gpt2"),
    "blenderbot": ("BlenderbotTokenizer", "blenderbot", "gpt2"),
    "clip": ("CLIPTokenizer", "clip", "gpt2"),
    "codegen": ("CodeGenTokenizer", "codegen", "gpt2"),
    "convbert": ("ConvBertTokenizer", "convbert", "bert"),
    "dpr": ("DPRQuestionEncoderTokenizer", "dpr", "bert"),
    "dpr context": ("DPRContextEncoderTokenizer", "dpr", "bert"),
    "esmc": ("EsmcTokenizer", "esmc", "gpt2"),
    "fnet": ("FNetTokenizer", "fnet", "xlmr"),
    "herbert": ("HerbertTokenizer", "bert", "gpt2"),
    "lasr": ("LasrTokenizer", "lasr_ctc", "t5"),
    "layoutlmv2": ("LayoutLMv2Tokenizer", "layoutlmv2", "bert"),
    "layoutlmv3": ("LayoutLMv3Tokenizer", "layoutlmv3", "gpt2"),
    "layoutxlm": ("LayoutXLMTokenizer", "layoutlmv2", "xlmr"),
    "luke": ("LukeTokenizer", "luke", "gpt2"),
    "mluke": ("MLukeTokenizer", "luke", "xlmr"),
    "markuplm": ("MarkupLMTokenizer", "markuplm", "gpt2"),
    "mbart50": ("MBart50Tokenizer", "mbart", "xlmr"),
    "nougat": ("NougatTokenizer", "vision-encoder-decoder", "gpt2"),
    "openai-gpt": ("OpenAIGPTTokenizer", "openai-gpt", "gpt2"),
    "parakeet": ("ParakeetTokenizer", "parakeet_ctc", "gpt2"),
    "qwen3.5": ("Qwen3_5Tokenizer", "qwen3_5", "qwen"),
    "reformer": ("ReformerTokenizer", "reformer", "llama"),
    "seamless": ("SeamlessM4TTokenizer", "seamless_m4t", "llama"),
    "siglip2": ("Siglip2Tokenizer", "siglip2", "llama"),
    "splinter": ("SplinterTokenizer", "splinter", "bert"),
    "tipsv2": ("Tipsv2Tokenizer", "tipsv2", "llama"),
    "udop": ("UdopTokenizer", "udop", "xlmr"),
    "videoprism": ("VideoPrismTokenizer", "videoprism", "t5"),
    "whisper": ("WhisperTokenizer", "whisper", "gpt2"),
    "xglm": ("XGLMTokenizer", "xglm", "xlmr"),
}
# A word segmenter in Python comes before it, and is not installed.
UNTRIED = {"RoFormerTokenizer"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of folders are read here, and none of them by anybody else."""
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path_factory.mktemp("cache")))


def token(content: str, **more: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **flags, **more}


# What a file beside tokenizer.json may say, one thing at a time.
CONFIGURED: tuple[dict[str, Any], ...] = (
    {},
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"strip_accents": True},
    {"strip_accents": False},
    {"tokenize_chinese_chars": False},
    {"keep_accents": True},
    {"split_by_punct": True},
    {"remove_space": False},
    {"add_prefix_space": True},
    {"add_prefix_space": False},
    {"legacy": True},
    {"legacy": False},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_eos_token": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"bos_token": "<made>"},
    {"eos_token": {"__type": "AddedToken", **token("<made>")}},
    {"cls_token": "[b]"},
    {"unk_token": "<made>"},
    {"pad_token": "<made>", "padding_side": "left"},
    {"added_tokens_decoder": {"630": token("<new>")}},
    {"added_tokens_decoder": {"630": token("<new>", special=True)}},
    {"added_tokens_decoder": {"630": token("<new>", normalized=True)}},
    {"added_tokens_decoder": {"630": token("new", single_word=True, lstrip=True)}},
    {"added_tokens_decoder": {"630": token("new", rstrip=True, normalized=True)}},
    {"additional_special_tokens": ["<new>"]},
    {"extra_special_tokens": ["<new>"]},
    {"extra_special_tokens": {"image_token": "<new>"}},
    {"image_token": "<new>"},
    {"truncation_side": "left"},
    {"model_max_length": 7},
    {"clean_up_tokenization_spaces": True},
    {"split_special_tokens": True},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
)
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("tokenizer_config.json", said) for said in CONFIGURED),
    ("special_tokens_map.json", {"eos_token": "<made>", "bos_token": token("<new>")}),
    ("special_tokens_map.json", {"additional_special_tokens": ["<new>", "<made>"]}),
    ("added_tokens.json", {"<new>": 700, "<made>": 701}),
    ("tokenizer.json", {"truncation": None, "padding": None}),
    (
        "tokenizer.json",
        {
            "truncation": {
                "direction": "Left",
                "max_length": 9,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
    ),
)


SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def folder(directory: Path, family: str, name: str = "tokenizer_config.json", **said: Any) -> Path:
    """A model folder without weights, whose file of that name says this too."""
    kind, model_type, tokenizer = {**FAMILIES, **KIN}[family]
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": {"model_type": model_type, **SIZE},
        "tokenizer.json": json.loads(tiny_tokenizer(tokenizer).to_str()),
        "tokenizer_config.json": {"tokenizer_class": kind} if kind else {},
    }
    files[name] = {**files.get(name, {}), **said}
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content), encoding="utf-8")
    return directory


def theirs(directory: Path) -> Callable[[str], list[int]]:
    """The ids of AutoTokenizer, whose special tokens are parsed in texts, too."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return lambda text: list(tokenizer(text, split_special_tokens=False)["input_ids"])


def all_settings(directory: Path, family: str) -> Iterator[tuple[str, Path]]:
    """A folder of that family for each setting."""
    for number, (name, said) in enumerate(SETTINGS):
        yield f"{family}: {name} {said}", folder(directory / str(number), family, name, **said)


def require_theirs(directory: Path, family: str) -> int:
    """Compare the ids under every setting; return under how many they are not tokenizer.json's."""
    changed = 0
    for said, place in all_settings(directory, family):
        try:
            expected = theirs(place)
        except Exception:  # a class that does not take it
            assert read_files(place).error is not None, said
            continue
        try:
            ids = [expected(text) for text in TEXTS]
        except Exception:  # a class without its unknown token
            with pytest.raises(ModelError, match="cannot tokenize"):
                read_tokenizer(place)
            continue
        found = read_tokenizer(place)
        assert [found.encode(text).ids for text in TEXTS] == ids, said
        alone = Tokenizer.from_file(str(place / "tokenizer.json"))
        alone.no_truncation()
        same = [alone.encode(text).ids == expected(text) for text in TEXTS]
        differs = read_files(place).differs is not None
        assert differs or all(same), said
        changed += differs
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_auto_tokenizer(family: str, tmp_path: Path) -> None:
    assert require_theirs(tmp_path, family) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("family", KIN)
def test_ids_are_those_of_auto_tokenizer_in_their_kin(family: str, tmp_path: Path) -> None:
    require_theirs(tmp_path, family)


def test_every_class_that_reads_tokenizer_json_is_tried() -> None:
    """A class that a release of transformers adds is a line in the table above."""
    named = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    classes = (tokenizer_class_from_name(name) for name in named)
    fast = {one.__name__ for one in classes if one and issubclass(one, TokenizersBackend)}
    kinds = (kind for kind, _, _ in {**FAMILIES, **KIN}.values() if kind)
    tried = {one.__name__ for kind in kinds if (one := tokenizer_class_from_name(kind))}
    assert len(fast) > 50
    assert fast - tried == UNTRIED


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert", do_lower_case=True)
    assert lowercases(place)
    folder(tmp_path, "bert", do_lower_case=False)
    assert not lowercases(place)


def test_where_the_files_disagree_it_is_said_with_an_example(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert", do_lower_case=False)
    said = note(place)
    assert said is not None
    assert "(normalizer" in said
    assert "tokenizer_config.json transformers' BertTokenizer gives [" in said
    assert note(folder(tmp_path, "bert", do_lower_case=True)) is None


def test_a_habit_of_cutting_and_padding_is_no_disagreement(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert", do_lower_case=True)
    plain = read_tokenizer(place).encode("the lazy dog " * 20).ids
    saved = tiny_tokenizer("bert")
    saved.enable_truncation(8)
    saved.enable_padding(length=300)
    saved.save(str(place / "tokenizer.json"))
    assert read_tokenizer(place).encode("the lazy dog " * 20).ids == plain
    assert note(place) is None


def test_tokenizer_json_alone_is_read_as_it_is(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert")
    document = json.loads((place / "tokenizer.json").read_text())
    document["normalizer"]["lowercase"] = False
    (place / "tokenizer.json").write_text(json.dumps(document))
    (place / "tokenizer_config.json").unlink()
    assert not lowercases(place)
    assert read_files(place).path == place / "tokenizer.json"
    assert note(place) is None


WITHOUT = """
import sys
from pathlib import Path
from embedjob.models.tokenizer import read_tokenizer
print(read_tokenizer(Path(sys.argv[1])).encode("Éa").ids)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_a_process_without_transformers_reads_the_same(tmp_path: Path) -> None:
    place = folder(tmp_path / "model", "bert", do_lower_case=False)
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(place)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "EMBEDJOB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == [str(theirs(place)("Éa")), "[]"]


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        (ByT5Tokenizer, "t5"),
        (CanineTokenizer, "canine"),
        (PerceiverTokenizer, "perceiver"),
    ],
)
def test_a_tokenizer_without_a_fast_version_is_refused_in_plain_words(
    kind: type, model_type: str, tmp_path: Path
) -> None:
    kind().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=rf"{kind.__name__} is written in Python.* use a model"):
        read_tokenizer(tmp_path)


def test_a_class_without_a_fast_version_is_no_class_of_its_tokenizer_json(tmp_path: Path) -> None:
    place = folder(tmp_path, "t5", tokenizer_class="ByT5Tokenizer")
    with pytest.raises(ModelError, match=r"ByT5Tokenizer is written .*gives other ids"):
        read_tokenizer(place)


def test_a_file_that_transformers_cannot_read_leaves_tokenizer_json(tmp_path: Path) -> None:
    own = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    place = folder(tmp_path, "gpt2", **own)
    (place / "config.json").write_text(json.dumps({"model_type": "theirs"}))
    assert read_files(place).path == place / "tokenizer.json"
    assert "trust_remote_code" in str(note(place))


def test_a_long_text_is_cut_on_the_side_that_the_folder_says(tmp_path: Path) -> None:
    """In tokenizer_config.json, or in a tokenizer.json that was saved with a habit of cutting."""
    place = folder(tmp_path, "bert", truncation_side="left", do_lower_case=True)
    text = "The quick brown fox jumps over the lazy dog. " * 4
    knobs = folder_layer(place)["encoder"]
    assert knobs["truncation_side"] == "left"
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    expected = tokenizer(text, truncation=True, max_length=20)["input_ids"]
    recipe = Recipe(model=str(place), max_tokens=20, truncation_side="left")
    assert load_tokenizer(recipe).views([text]).full_ids(0).tolist() == expected
    habit = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    folder(tmp_path, "bert", "tokenizer.json", truncation=habit)
    assert folder_layer(place)["encoder"]["truncation_side"] == "left"
    (place / "tokenizer_config.json").unlink()
    assert folder_layer(place)["encoder"]["truncation_side"] == "left"
    folder(tmp_path, "bert")
    assert "truncation_side" not in folder_layer(place)["encoder"]


# --- what the fingerprint hashes ---


def digests(place: Path) -> Mapping[str, str]:
    """The digests of a folder's tokenizer files."""
    return tokenizer_digests(components_of_folder(place))


def components_of_folder(place: Path) -> ModelComponents:
    return components_of(Recipe(model=str(place)))


def test_files_beside_are_hashed_only_where_they_change_ids(tmp_path: Path) -> None:
    place = tiny.save("bert", tmp_path / "model")
    alone = model_digests(components_of_folder(place))
    assert {*digests(place)} == {"tokenizer.json"}
    for said in ({"do_lower_case": True}, {"model_max_length": 9}, {"truncation_side": "left"}):
        config = {"tokenizer_class": "BertTokenizer", **said}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        assert model_digests(components_of_folder(place)) == alone, said
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    assert {*digests(place)} == {"tokenizer.json", "tokenizer_config.json"}
    (place / "added_tokens.json").write_text(json.dumps({"<new>": 700}))
    both = {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
    assert {*digests(place)} == both
    now = model_digests(components_of_folder(place))
    assert {*now} - {*alone} == both - {"tokenizer.json"}


def test_a_tokenizer_json_of_another_version_is_hashed_where_it_is_read(tmp_path: Path) -> None:
    place = folder(tmp_path, "bert", do_lower_case=True, fast_tokenizer_files=["tokenizer.json"])
    document = json.loads((place / "tokenizer.json").read_text())
    document["post_processor"] = None
    (place / "tokenizer.4.0.0.json").write_text(json.dumps(document))
    assert {*digests(place)} == {"tokenizer.json"}
    versions = ["tokenizer.4.0.0.json"]
    # A class that reads the file as it is.
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "fast_tokenizer_files": versions}
    (place / "tokenizer_config.json").write_text(json.dumps(own))
    (place / "config.json").write_text(json.dumps({"model_type": "modernbert", **SIZE}))
    expected = theirs(place)
    assert [read_tokenizer(place).encode(text).ids for text in TEXTS] == [*map(expected, TEXTS)]
    assert {*digests(place)} == {"tokenizer.json", "tokenizer_config.json", *versions}


def test_of_an_old_layout_too(tmp_path: Path) -> None:
    inner = folder(tmp_path / "0_Transformer", "bert", do_lower_case=False)
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    expected = theirs(inner)
    assert [read_tokenizer(tmp_path).encode(t).ids for t in TEXTS] == [expected(t) for t in TEXTS]
    names = {f"0_Transformer/{name}" for name in ("tokenizer.json", "tokenizer_config.json")}
    assert {*digests(tmp_path)} == names
