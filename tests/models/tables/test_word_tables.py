"""Tables of words: files of word2vec, GloVe and gensim, whole and damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from embedjob.errors import ModelError
from embedjob.models.tables.word_tables import read_table

WORDS = ["the", "fox", "Zwölf", "日本", "U.S."]
VECTORS = np.random.default_rng(3).normal(size=(len(WORDS), 6)).astype(np.float32)


def lines(words: list[str] = WORDS, vectors: np.ndarray = VECTORS) -> list[str]:
    """A line of each word, every number with all the digits that tell it from its neighbours."""
    return [
        f"{word} {' '.join(np.format_float_positional(x) for x in vector)}"
        for word, vector in zip(words, vectors, strict=True)
    ]


def binary(words: list[str] = WORDS, *, after: bytes = b"\n") -> bytes:
    """The file that word2vec's own C code writes with -binary 1."""
    body = b"".join(
        word.encode() + b" " + struct.pack(f"<{len(vector)}f", *vector) + after
        for word, vector in zip(words, VECTORS, strict=True)
    )
    return f"{len(words)} {VECTORS.shape[1]}\n".encode() + body


HEADER = f"{len(WORDS)} {VECTORS.shape[1]}\n"
GLOVE = "\n".join(lines()) + "\n"
FILES = {
    "glove.txt": GLOVE.encode(),
    "no_end_of_line.txt": GLOVE.rstrip().encode(),
    "windows.txt": GLOVE.replace("\n", "\r\n").encode(),
    "word2vec.vec": (HEADER + GLOVE).encode(),
    # The C code ends each line with a blank.
    "blank_at_the_end.txt": (HEADER + GLOVE.replace("\n", " \n")).encode(),
    "packed.txt.gz": gzip.compress(GLOVE.encode()),
    "word2vec.bin": binary(),
    "gensim.bin": binary(after=b""),
    "packed.bin.gz": gzip.compress(binary()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_words_and_their_numbers(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    table = read_table(tmp_path / name)
    assert list(table.words) == WORDS
    assert np.array_equal(table.vectors_VD, VECTORS)
    assert table.vectors_VD.dtype == np.float32


def test_of_a_word_that_is_there_twice_the_first_vector_counts(tmp_path: Path) -> None:
    words = ["a", "b", "a", "c", "b"]
    (tmp_path / "twice.txt").write_text("\n".join(lines(words)))
    table = read_table(tmp_path / "twice.txt")
    assert list(table.words) == ["a", "b", "c"]
    assert np.array_equal(table.vectors_VD, VECTORS[[0, 1, 3]])


def test_a_word_may_have_blanks_in_it_as_some_of_glove_840b(tmp_path: Path) -> None:
    words = [". . .", "at name@domain.com", "the", "b", "c"]
    (tmp_path / "blanks.txt").write_text("\n".join(lines(words)[2:] + lines(words)[:2]))
    table = read_table(tmp_path / "blanks.txt")
    assert list(table.words) == [*words[2:], *words[:2]]
    assert np.array_equal(table.vectors_VD, VECTORS[[2, 3, 4, 0, 1]])


def test_bytes_that_are_no_utf8_are_a_word_that_no_text_has(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(GLOVE.encode().replace(b"fox", b"f\xffx"))
    assert read_table(tmp_path / "bytes.txt").words[1] == "f\ufffdx"


def test_more_words_than_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedjob.models.tables.word_tables._LINES_AT_ONCE", 2)
    monkeypatch.setattr("embedjob.models.tables.word_tables._READ_BYTES", 29)
    for name in ("word2vec.vec", "word2vec.bin", "glove.txt"):
        (tmp_path / name).write_bytes(FILES[name])
        if name == "glove.txt":
            monkeypatch.setattr("embedjob.models.tables.word_tables._READ_BYTES", 1 << 20)
        table = read_table(tmp_path / name)
        assert list(table.words) == WORDS
        assert np.array_equal(table.vectors_VD, VECTORS)


NAN = GLOVE.replace(lines()[2].split()[3], "nan")
DAMAGED = {
    "empty.txt": (b"", "begins with b'', which is no word with numbers"),
    "prose.txt": (b"Hello\nWorld\n", "begins with b'Hello"),
    "nothing.txt": (b"0 6\n", "has no words"),
    "nothing.bin": (b"0 6\n", "has no words"),
    "short.vec": ((HEADER + GLOVE)[:-40].encode(), "has no numbers|has no 6 numbers"),
    "fewer.vec": ((HEADER + "\n".join(lines()[:3])).encode(), "has 3 words, and .* says 5"),
    "cut.bin": (binary()[:-9], "ends after 4 of 5 words"),
    "text.bin": (GLOVE.encode(), "does not begin with the number of words"),
    "other.txt": (GLOVE.replace(lines()[1].split()[3], "1.0x").encode(), "has no numbers in"),
    "narrow.txt": ("\n".join([*lines(), "word 1 2 3"]).encode(), "has no 6 numbers .* line 6"),
    "nan.txt": (NAN.encode(), "has a number that is not finite, in the vector of 'Zwölf'"),
    "huge.txt": (GLOVE.replace(lines()[1].split()[3], "1e39").encode(), "not finite, in .*'fox'"),
    "cut.txt.gz": (gzip.compress(GLOVE.encode())[:-20], "cannot be read"),
    "plain.txt.gz": (GLOVE.encode(), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    data, said = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=said):
        read_table(tmp_path / name)


@pytest.mark.parametrize("is_binary", [False, True])
def test_files_of_gensim_are_read_and_read_by_gensim(is_binary: bool, tmp_path: Path) -> None:
    keyed = pytest.importorskip("gensim.models").KeyedVectors
    vectors = keyed(vector_size=VECTORS.shape[1])
    vectors.add_vectors(WORDS, VECTORS)
    path = tmp_path / ("gensim.bin" if is_binary else "gensim.txt")
    vectors.save_word2vec_format(str(path), binary=is_binary)
    table = read_table(path)
    assert list(table.words) == WORDS
    assert np.array_equal(table.vectors_VD, VECTORS)
    ours = tmp_path / ("ours.bin" if is_binary else "ours.txt")
    ours.write_bytes(binary() if is_binary else (HEADER + GLOVE).encode())
    theirs = keyed.load_word2vec_format(str(ours), binary=is_binary)
    assert theirs.index_to_key == WORDS
    assert np.array_equal(theirs.vectors, VECTORS)
