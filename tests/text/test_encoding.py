import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt
from tests.fakes import FAMILIES, LITERALS, tiny_tokenizer

LETTERS = st.text(alphabet="ab Tte.x\n\"'é日😀\u0301<|>[]s/\x00", max_size=12)


def _specials(tokenizer: Tokenizer) -> dict[int, str]:
    added = tokenizer.get_added_tokens_decoder()
    return {token: entry.content for token, entry in added.items() if entry.special}


def _texts(family: str) -> st.SearchStrategy[str]:
    """Texts full of the family's special tokens, whole and in halves."""
    names = sorted(_specials(tiny_tokenizer(family)).values())
    halves = [half for name in names for half in (name[:2], name[2:])]
    return st.lists(st.sampled_from([*names, *halves]) | LETTERS, max_size=5).map("".join)


@cache
def _without_specials(family: str) -> Tokenizer:
    """The family's tokenizer as it would be had nobody marked a token as special."""
    document = json.loads(tiny_tokenizer(family).to_str())
    document["added_tokens"] = []
    document["post_processor"] = None
    if isinstance(document["model"]["vocab"], list):
        # Unigram would find the names as pieces of its vocabulary; none of these can be typed.
        names = set(_specials(tiny_tokenizer(family)).values())
        vocabulary = document["model"]["vocab"]
        document["model"]["vocab"] = [
            [f"\U000f1234{word}" if word in names else word, score] for word, score in vocabulary
        ]
    return Tokenizer.from_str(json.dumps(document))


@cache
def _encoder(family: str, prompt: Prompt, special_tokens: bool = True) -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer(family), (prompt,), special_tokens=special_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_special_token_typed_in_a_text_is_plain_text(family: str, data: st.DataObject) -> None:
    texts = data.draw(st.lists(_texts(family), min_size=1, max_size=3))
    encoder = _encoder(family, Prompt("", ""), special_tokens=False)
    found = encoder.encode([0] * len(texts), texts, offsets=False)
    reference = _without_specials(family)
    assert [e.ids for e in found] == [reference.encode(text).ids for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_special_tokens_of_the_template_stay_and_those_of_the_text_never_count(
    family: str, data: st.DataObject
) -> None:
    literal = LITERALS[family]
    # The blanks of a half-written special token wait at both seams.
    prompt = Prompt(f"{literal}x{literal[:-1]}", f"{literal[1:]}y{literal}")
    text = data.draw(_texts(family))
    encoder = _encoder(family, prompt)
    ids = encoder.encode([0], [text], offsets=False)[0].ids
    tokenizer = tiny_tokenizer(family)
    specials = _specials(tokenizer).keys() - {tokenizer.token_to_id("[UNK]")}
    specials -= {tokenizer.token_to_id("<unk>")}
    expected = encoder.frame.before + encoder.frame.after + 2
    assert sum(token in specials for token in ids) == expected
    assert sum(token == tokenizer.token_to_id(literal) for token in ids) >= 2


@pytest.mark.parametrize("plain", ["<unk>", "x<unk>y", "the <unk> bank"])
@pytest.mark.parametrize("widened", ["<", "<>", "<unk>"])
def test_the_unknown_token_that_a_normalizer_makes_is_plain_text_too(
    plain: str, widened: str
) -> None:
    typed = plain.translate({ord(letter): ord(letter) + 0xFEE0 for letter in widened})
    assert plain not in typed
    encoder = _encoder("xlmr", Prompt("", ""), special_tokens=False)
    found = encoder.encode([0, 0, 0], [typed, plain, "the bank"], offsets=False)
    expected = _without_specials("xlmr").encode(plain).ids
    assert [one.ids for one in found[:2]] == [expected, expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_between_two_special_tokens_a_text_is_what_it_is_alone(family: str) -> None:
    literal = LITERALS[family]
    text = f"The river {literal} bank"
    encoder = _encoder(family, Prompt(literal, literal), special_tokens=False)
    ids = encoder.encode([0], [text], offsets=False)[0].ids
    token = tiny_tokenizer(family).token_to_id(literal)
    assert (ids[0], ids[-1]) == (token, token)
    alone = _without_specials(family).encode(text).ids
    if family == "mistral":  # Its Metaspace puts a blank before the very first piece only.
        assert ids[1:-1] != alone
        alone = _without_specials(family).encode("a" + text).ids[2:]
        assert ids[-1 - len(alone) : -1] == alone
    else:
        assert ids[1:-1] == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_texts_give_the_tokenizers_own_ids(family: str) -> None:
    prompt = Prompt(f"{LITERALS[family]}Query: ", "\nmeans")
    texts = ["how do I?", "", " x ", "日本 😀", "nul\x00nul", '{"a": 1}']
    encoder = _encoder(family, prompt)
    bare = tiny_tokenizer(family)
    for offsets in (True, False):
        found = encoder.encode([0] * len(texts), texts, offsets=offsets)
        assert [e.ids for e in found] == [bare.encode(prompt.render(text)).ids for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_text_is_the_tokens_that_overlap_it(family: str, data: st.DataObject) -> None:
    prompt = data.draw(
        st.sampled_from([Prompt("Query: ", ' "y'), Prompt('x "', ""), Prompt("", "é y")])
    )
    text = data.draw(_texts(family))
    encoder = _encoder(family, prompt)
    encoding = encoder.encode([0], [text], offsets=True)[0]
    first, stop = encoder.text_tokens([encoding], [0], [text])[0].tolist()
    begin, end = len(prompt.before), len(prompt.before) + len(text)
    frame, count = encoder.frame, len(encoding.ids)
    assert frame.before <= first <= stop <= count - frame.after
    if not text:
        assert first == stop
        return
    for token in range(frame.before, count - frame.after):
        left, right = encoding.offsets[token]
        overlaps = left < end and right > begin
        # A token without characters belongs to the text at the view's own ends only.
        edge = left == right or (token < first and not prompt.before)
        assert (first <= token < stop) == overlaps or edge, (token, encoding.tokens)


@pytest.mark.parametrize("family", ["gpt2", "qwen", "llama3", "llama", "mistral"])
def test_a_token_that_the_text_shares_with_the_template_counts_as_text(family: str) -> None:
    encoder = _encoder(family, Prompt("x", "sentence"))
    encoding = encoder.encode([0], [" "], offsets=True)[0]
    first, stop = encoder.text_tokens([encoding], [0], [" "])[0].tolist()
    shared = encoding.tokens[first:stop]
    assert len(shared) == 1
    assert shared[0][0] in "Ġ▁"
    assert len(shared[0]) > 1


def test_a_text_that_vanishes_has_no_token() -> None:
    encoder = _encoder("bert", Prompt("Query: ", " x"))
    for text in ("", "  ", "\x00\t"):
        encoding = encoder.encode([0], [text], offsets=True)[0]
        assert encoder.text_tokens([encoding], [0], [text]).tolist() == [[3, 3]]


def test_cutting_and_padding_of_the_tokenizer_file_are_off() -> None:
    tokenizer = tiny_tokenizer("bert")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    encoder = PromptEncoder(tokenizer, (Prompt("", ""),), special_tokens=True)
    text = "the quick brown fox jumps over"
    names = ["[CLS]", *text.split(), "[SEP]"]
    ids = encoder.encode([0], [text], offsets=False)[0].ids
    assert ids == [tokenizer.token_to_id(name) for name in names]
