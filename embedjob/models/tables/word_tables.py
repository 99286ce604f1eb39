"""Word tables: words and their vectors, in the files of word2vec, GloVe and gensim.

Text files hold a word and its numbers on each line; those of word2vec begin with the number of
words and of dimensions. Binary files are word2vec's: that line, then each word, a blank, and its
numbers in float32. A file may be compressed with gzip.
Sources: word2vec (Mikolov et al. 2013, arXiv:1301.3781), GloVe (Pennington et al., EMNLP 2014).

Shapes: V words, D dimensions.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from embedjob.errors import ModelError

TABLE_SUFFIXES = (".txt", ".vec", ".bin", ".txt.gz", ".vec.gz", ".bin.gz")
_VOCABULARY = re.compile(r"vocabulary-[0-9a-f]{12}\.safetensors")
_LINES_AT_ONCE = 20_000
_WIDEST = 100_000
_READ_BYTES = 1 << 24
_REMEDY = "give the whole file, as word2vec, GloVe or gensim's save_word2vec_format wrote it"


@dataclass(frozen=True)
class WordTable:
    """The words of a table, each once, and their vectors [V, D] in float32."""

    words: Sequence[str]
    vectors_VD: npt.NDArray[np.float32]


def is_table(name: str) -> bool:
    """Return whether a file is a word table, by its name."""
    return name.lower().endswith(TABLE_SUFFIXES)


def is_vocabulary(name: str) -> bool:
    """Return whether a file is a vocabulary that a fit has made, by its name."""
    return bool(_VOCABULARY.fullmatch(name.rpartition("/")[2]))


def read_table(path: Path) -> WordTable:
    """Return the words and vectors of a file.

    Of a word that is there twice the first vector counts, as in gensim; bytes that are no UTF-8 are
    replaced.

    Raises:
        ModelError: it is damaged, has no words, or a number that is not finite.
    """
    binary = path.name.lower().removesuffix(".gz").endswith(".bin")
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            read = _read_binary if binary else _read_text
            words, vectors_VD = read(cast(IO[bytes], file), path)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if not words:
        raise _damaged(path, "has no words")
    finite_V = np.isfinite(vectors_VD).all(axis=1)
    if not finite_V.all():
        first = words[int(finite_V.argmin())]
        raise _damaged(path, f"has a number that is not finite, in the vector of {first!r}")
    return _each_once(words, vectors_VD)


def _each_once(words: list[str], vectors_VD: npt.NDArray[np.float32]) -> WordTable:
    first: dict[str, int] = {}
    for place, word in enumerate(words):
        first.setdefault(word, place)
    if len(first) == len(words):
        return WordTable(words, vectors_VD)
    return WordTable([*first], vectors_VD[[*first.values()]])


def _read_text(file: IO[bytes], path: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    begin = file.readline(_READ_BYTES)
    header = _header(begin)
    width = header[1] if header else len(begin.split()) - 1
    if not 1 <= width <= _WIDEST:
        raise _damaged(path, f"begins with {begin[:60]!r}, which is no word with numbers")
    words: list[str] = []
    blocks = [np.empty((0, width), np.float32)]
    for lines in _some_lines(file, [] if header else [begin]):
        names: list[str] = []
        rests: list[bytes] = []
        for line in lines:
            name, rest = _parted(line.rstrip(), width)
            if rest is None:
                place = len(words) + len(names) + 1 + bool(header)
                raise _damaged(path, f"has no {width} numbers after a word in line {place}")
            names.append(name.decode("utf-8", "replace"))
            rests.append(rest)
        flat = _numbers(b" ".join(rests))
        if flat is None or len(flat) != width * len(names):
            raise _damaged(path, f"has no numbers in a line after {len(words)} words")
        words += names
        with np.errstate(over="ignore"):  # reported by the caller, with its word
            blocks.append(flat.astype(np.float32).reshape(-1, width))
    if header and header[0] != len(words):
        raise _damaged(path, f"has {len(words)} words, and its first line says {header[0]}")
    return words, np.concatenate(blocks)


def _parted(line: bytes, width: int) -> tuple[bytes, bytes | None]:
    """Return a line's word and its numbers, None where there are fewer; words may have blanks."""
    if line.count(b" ") == width:
        name, _, rest = line.partition(b" ")
        return name, rest
    name, *fields = line.rsplit(b" ", width)
    return name, b" ".join(fields) if len(fields) == width else None


def _numbers(text: bytes) -> npt.NDArray[np.float64] | None:
    """Return the numbers of a text with blanks between them; None where something else is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text.decode("ascii"), np.float64, sep=" ")
        except (ValueError, DeprecationWarning):
            return None


def _some_lines(file: IO[bytes], begin: list[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines that are not empty, some at a time."""
    lines = begin
    for line in file:
        if line.strip(b" \r\n"):
            lines.append(line)
        if len(lines) >= _LINES_AT_ONCE:
            yield lines
            lines = []
    yield lines


def _read_binary(file: IO[bytes], path: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    header = _header(file.readline(_READ_BYTES))
    if header is None or not 1 <= header[1] <= _WIDEST:
        raise _damaged(path, "does not begin with the number of words and of dimensions")
    count, width = header
    size = 4 * width
    words: list[str] = []
    blocks = [np.empty((0, width), np.float32)]
    rows: list[npt.NDArray[np.float32]] = []
    held, at = b"", 0
    while len(words) < count:
        blank = held.find(b" ", at)
        if blank < 0 or blank + 1 + size > len(held):
            more = file.read(_READ_BYTES)
            if not more:
                raise _damaged(path, f"ends after {len(words)} of {count} words")
            # Each row is a view of a block that was read, and would keep it.
            blocks += [np.stack(rows)] if rows else []
            held, at, rows = held[at:] + more, 0, []
            continue
        words.append(held[at:blank].lstrip(b"\n").decode("utf-8", "replace"))
        rows.append(np.frombuffer(held, "<f4", width, blank + 1))
        at = blank + 1 + size
    return words, np.concatenate([*blocks, *([np.stack(rows)] if rows else [])])


def _header(line: bytes) -> tuple[int, int] | None:
    """Return the numbers of words and of dimensions; None of a line that says something else."""
    fields = line.split()
    if len(fields) != len(("words", "dimensions")) or not all(map(bytes.isdigit, fields)):
        return None
    return int(fields[0]), int(fields[1])


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"encoder.model: {path} {what}; {_REMEDY}")
