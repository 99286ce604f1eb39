"""Sentences: what a text consists of, and where its passages may end.

Sentences are those of sentencex, by the rules that all languages share; a line break ends one, too.
One that has more tokens than a passage may have is broken up into words, a word into characters.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

from embedjob.errors import ConfigError

# Its rules for other languages differ in their abbreviations.
_LANGUAGE = "en"
_LINES = re.compile(r"[^\r\n]*[\r\n]+|[^\r\n]+")
_WORDS = re.compile(r"\s*\S+\s*")
# The library ends no sentence between two of them: one alone would decide of a whole line.
_PAIRED = re.compile(
    r"""["'()\[\]{}«»\u2018-\u201f\u2039\u203a\u3008-\u3011\u301d-\u301f\uff02\uff08\uff09]"""
)
_CLOSING = re.compile(rf"{_PAIRED.pattern}+\s*")
_EMPTY_LINE = re.compile(r"(\r\n|\r|\n)[^\S\r\n]*(\r\n|\r|\n)")


@cache
def sentence_library() -> Any:
    """Return sentencex; ConfigError where it is not installed."""
    try:
        import sentencex
    except ImportError as error:
        raise ConfigError(
            "encoder.long_text: got split, which needs the package sentencex; install it with pip"
            " install 'embedjob[split]' on every node, or set long_text: chunk_mean"
        ) from error
    return sentencex


def find_sentences(text: str) -> list[str]:
    """Split a text into sentences, each with the blanks after it; together they are the text.

    Code and tables are split into lines. A text of blanks alone is one sentence, an empty text has
    none.
    """
    return [*_with_blanks(one for line in _LINES.findall(text) for one in _of_line(line))]


def _of_line(line: str) -> list[str]:
    """Split a line into its sentences; the library never sees the blanks at its end."""
    body = line.rstrip()
    if not body:
        return [line]
    found: list[str] = sentence_library().segment(_LANGUAGE, _PAIRED.sub("_", body))
    ends = [*accumulate(map(len, found))]
    if ends[-1:] != [len(body)]:  # nothing may be lost: a line is short enough
        return [line]
    stops = sorted({_behind_closing(body, end) for end in ends[:-1]} - {len(body)})
    return [line[first:stop] for first, stop in pairwise([0, *stops, len(line)])]


def _behind_closing(text: str, end: int) -> int:
    """Return where a sentence ends, with what closes behind its full stop."""
    closing = None if text[end - 1].isspace() else _CLOSING.match(text, end)
    return end if closing is None else closing.end()


def break_up(sentence: str) -> list[str]:
    """Split a sentence into its words, or a word into its characters, each with blanks after it."""
    words = _WORDS.findall(sentence)
    return words if len(words) > 1 else [*_with_blanks(sentence)]


def ends_paragraph(sentence: str) -> bool:
    """Tell whether an empty line follows a sentence."""
    return _EMPTY_LINE.search(sentence, len(sentence.rstrip())) is not None


def _with_blanks(runs: Iterable[str]) -> Iterator[str]:
    """Yield the runs of a text with the blank ones that follow; the first may begin with some."""
    held: list[str] = []
    solid = False
    for run in runs:
        is_solid = bool(run.strip())
        if solid and is_solid:
            yield "".join(held)
            held, solid = [], False
        held.append(run)
        solid = solid or is_solid
    if held:
        yield "".join(held)
