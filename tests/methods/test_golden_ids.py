"""The ids that a few methods give under tokenizers of every family, written out in golden_ids.yaml.

What the references cannot see is held here: a change in the tiny tokenizers, or one that moves the
library and the references alike.
"""

from pathlib import Path

import pytest
import yaml

from tests.fakes import EOS, tiny_tokenizer
from tests.methods.making import Setting
from tests.methods.settings import S

TEXT = 'A "café" by the river'
FAMILIES = ("llama", "mistral", "llama3", "qwen", "gpt2", "opt", "bert")
SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOKENS = {"llara": S, "promptreps": SPECIALS}
GOLDEN = yaml.safe_load(Path(__file__).with_name("golden_ids.yaml").read_text(encoding="utf-8"))


def setting(method: str, family: str) -> Setting:
    if method != "e5_mistral":
        return Setting(method, "document", "-", family, TOKENS.get(method, ()))
    eos = tiny_tokenizer(family).token_to_id(EOS[family])
    knobs = {"instruction": "Find", "special_tokens": {"eos_id": eos}}
    return Setting(method, "query", "-", family, knobs=knobs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prompteol", "e5_mistral", "llara", "promptreps"])
def test_the_ids_are_what_they_were(method: str, family: str) -> None:
    ids = setting(method, family).views().views([TEXT]).full_ids(0)
    assert ids.tolist() == [int(token) for token in GOLDEN[method][family].split()]
