"""Sentences of several languages, of code, and of pages that have none: nothing is ever lost."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.errors import ConfigError
from embedjob.text.passages import sentences as library
from embedjob.text.passages.sentences import break_up, ends_paragraph, find_sentences

DATA = Path(__file__).parents[3].parent / "shared" / "data"
PIECES = st.sampled_from(
    [
        "A fox. ",
        "Is it? ",
        "\n",
        "\n\n",
        "\r\n",
        "  ",
        "日本語。",
        "x = 1",
        "3.14",
        "e\u0301",
        "😀",
        "…",
        '"',
        "(No. 1)",
        "”",
        "a",
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text(max_size=80))


@given(TEXTS)
def test_the_parts_of_a_text_are_the_text(text: str) -> None:
    parts = find_sentences(text)
    assert "".join(parts) == text
    assert all(part.strip() for part in parts) or (len(parts) == 1 and not text.strip())
    for part in parts:
        smaller = break_up(part)
        assert "".join(smaller) == part
        assert all(one.strip() for one in smaller) or not part.strip()


@pytest.mark.skipif(not DATA.exists(), reason="there is no shared data")
def test_nothing_is_lost_of_naughty_strings_and_thirty_scripts() -> None:
    naughty = json.loads((DATA / "robustness" / "blns.json").read_text(encoding="utf-8"))
    lines = (DATA / "robustness" / "udhr2.jsonl").read_text(encoding="utf-8").splitlines()
    for text in [*naughty, *(json.loads(line)["text"] for line in lines)]:
        assert "".join(find_sentences(text)) == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It works. Does it? Yes!", ["It works. ", "Does it? ", "Yes!"]),
        ("Mr. Fox paid 3.14 dollars. He left.", ["Mr. Fox paid 3.14 dollars. ", "He left."]),
        ("Das gilt z. B. hier. Warum?", ["Das gilt z. B. hier. ", "Warum?"]),
        ("他来了。她走了。你呢", ["他来了。", "她走了。", "你呢"]),
        (
            'She said "Stop. Now." (Twice.) He left.',
            ['She said "Stop. ', 'Now." ', "(Twice.) ", "He left."],
        ),
        ("他说“停。”然后走了。", ["他说“停。”", "然后走了。"]),
        (
            "def f(x):\n    return x\n\n\ny = f(1)\n",
            ["def f(x):\n", "    return x\n\n\n", "y = f(1)\n"],
        ),
        ("- one\r\n- two\r\n", ["- one\r\n", "- two\r\n"]),
        ("no full stop at all", ["no full stop at all"]),
        ("  \n ", ["  \n "]),
        ("", []),
    ],
)
def test_sentences_end_where_readers_say_so(text: str, parts: list[str]) -> None:
    assert find_sentences(text) == parts


@pytest.mark.parametrize("mark", ['"', "“", "(", "「", "[", "'", "«"])
def test_a_mark_that_nothing_closes_changes_its_own_sentence_alone(mark: str) -> None:
    """Between two of them the library ends no sentence: one more would change a whole line."""
    before, after = (
        'He came. She said "no" (twice). It is late. ',
        'He left. "Why?" It rained. Yes.',
    )
    plain, odd = (
        find_sentences(f"{before}One. {after}"),
        find_sentences(f"{before}{mark}One. {after}"),
    )
    assert [one for one in odd if one not in plain] == [f"{mark}One. "]
    assert len(odd) == len(plain)


def test_a_sentence_is_words_and_a_word_is_characters() -> None:
    assert break_up(" one two\n") == [" one ", "two\n"]
    assert break_up("日本 ") == ["日", "本 "]
    assert break_up("x") == ["x"]


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", " \n \t\n", "\n\n\n  "])
def test_an_empty_line_ends_a_paragraph(end: str) -> None:
    assert ends_paragraph(f"It works.{end}")
    assert not ends_paragraph("It works.\n")
    assert not ends_paragraph(f"one{end}two. ")


def test_without_the_library_the_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    library.sentence_library.cache_clear()
    with pytest.raises(ConfigError, match=r"split, which needs the package sentencex.*pip install"):
        library.sentence_library()
