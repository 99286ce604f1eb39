"""Twins of tokenizers, in which no text can hold the name of a special token.

Covers: embedjob.text.encoding
"""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from embedjob.text.encoding import secret_twin
from tests.fakes import FAMILIES, LITERALS, SENTENCES, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_as_long_as_what_they_stand_for_and_keep_the_ids(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    renamed, names = secret_twin(tokenizer)
    assert LITERALS[family] in names
    for content, name in names.items():
        assert len(name) == len(content)
        assert renamed.token_to_id(name) == tokenizer.token_to_id(content)
        assert renamed.encode(name, add_special_tokens=False).ids == [
            tokenizer.token_to_id(content)
        ]
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_reads_plain_text_alike(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    renamed, _ = secret_twin(tokenizer)
    for text in (*SENTENCES, "", "😀 unknown 𓀀"):
        assert renamed.encode(text).ids == tokenizer.encode(text).ids


def test_names_differ_from_twin_to_twin_so_that_no_text_can_hold_one() -> None:
    tokenizer = tiny_tokenizer("qwen")
    assert not set(secret_twin(tokenizer)[1].values()) & set(secret_twin(tokenizer)[1].values())


def test_ordinary_words_that_are_marked_special_stay_words() -> None:
    document = json.loads(tiny_tokenizer("gpt2").to_str())
    merged = "".join(max(document["model"]["merges"], key=lambda pair: len("".join(pair))))
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens(["!", merged, AddedToken("<|x|>", lstrip=True)])
    renamed, names = secret_twin(tokenizer)
    assert set(names) == {"<|endoftext|>", "<|x|>"}
    assert renamed.encode(f"a!{merged}").ids == tokenizer.encode(f"a!{merged}").ids
