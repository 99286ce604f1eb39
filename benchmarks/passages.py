"""Passages of ours beside semantic-text-splitter and semchunk: borders, fullness, edits, speed.

Each splits the same documents into passages of at most as many tokens of all-MiniLM. A document is
sixty sentences of STS-B in its language, whose ends are known, a review, a file of this package, or
the words of reviews without punctuation. An edit inserts, deletes or changes one sentence, line or
word of a document, and a passage is new whose text the document did not have before. Of ours more
than three are new only where the bound forces it, which is looked at: it cuts a new stretch between
landmarks, and an edit makes three new stretches at most.

    python -m benchmarks.passages [--documents 500] [--edits 500] [--max-tokens 400] [--seed 0]
        [--kinds reviews en de zh code "no full stops"]
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import semchunk
from semantic_text_splitter import TextSplitter

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import CORPORA, MINILM, corpus
from embedjob.config.recipe import Split
from embedjob.models.source import ModelSource, materialize
from embedjob.models.tokenizer import read_tokenizer
from embedjob.text.arrays import offsets_of
from embedjob.text.encoding import TokenCounter
from embedjob.text.passages.borders import landmarks, ranked_sentences
from embedjob.text.passages.splitting import PassageSplitter

PACKAGES = ("sentencex", "semantic-text-splitter", "semchunk", "tokenizers", "numpy")
SENTENCES_EACH = 60
# Gives the passages of a text, each with all its characters.
SplitText = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Document:
    """A text as the units between which it may be split, and what joins them."""

    units: tuple[str, ...]
    joint: str

    @property
    def text(self) -> str:
        """The text itself."""
        return self.joint.join(self.units)

    def ends(self) -> set[int]:
        """The characters at which its units end, with and without the blanks after them."""
        sizes = np.cumsum([len(unit) + len(self.joint) for unit in self.units])
        return {int(end) for end in sizes} | {int(end) - len(self.joint) for end in sizes}

    def edited(self, other: str, draw: np.random.Generator) -> "Document":
        """The document with one unit inserted, deleted or changed."""
        place = int(draw.integers(len(self.units)))
        before, own, after = self.units[:place], self.units[place], self.units[place + 1 :]
        middle = [(other, own), (), (other,)][int(draw.integers(3))]
        return Document((*before, *middle, *after), self.joint)


def documents(count: int) -> Mapping[str, list[Document]]:
    """So many documents of each kind, or as many as there are."""
    reviews = [text.split("\n") for text in corpus("reviews")[:count]]
    words = [re.findall(r"\w+", " ".join(lines)) for lines in reviews]
    package = sorted(Path(__file__).parents[1].glob("embedjob/**/*.py"))
    code = [path.read_text(encoding="utf-8").split("\n") for path in package]
    return {
        "reviews": [Document(tuple(lines), "\n") for lines in reviews],
        **{kind: [*_of_sentences(kind, count)] for kind in ("en", "de", "zh")},
        "code": [Document(tuple(lines), "\n") for lines in code if len(lines) > 1][:count],
        "no full stops": [Document(tuple(one), " ") for one in words],
    }


def _of_sentences(language: str, count: int) -> Iterator[Document]:
    data = CORPORA.parent
    name = "sts/stsb.dev" if language == "en" else f"multilingual/stsb-{language}.dev"
    with (data / f"{name}.jsonl").open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    ends = ".!?\u3002\uff01\uff1f"
    sentences = [one for pair in pairs for one in (pair["s1"], pair["s2"]) if one[-1:] in ends]
    sentences = list(dict.fromkeys(sentences))
    joint = "" if language == "zh" else " "
    for start in range(0, len(sentences), SENTENCES_EACH)[:count]:
        yield Document(tuple(sentences[start : start + SENTENCES_EACH]), joint)


def splitters(most: int) -> Mapping[str, SplitText]:
    """Ours, and the peers, by the same tokenizer."""
    tokenizer = read_tokenizer(materialize(ModelSource(MINILM)))
    ours = PassageSplitter(Split(max_tokens=most), TokenCounter(tokenizer))

    def split(text: str) -> list[str]:
        found = ours([text])
        return [text[start:stop] for start, stop in found.chars.tolist()]

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    merged = TextSplitter.from_callback(count, most, trim=False)
    chunker = semchunk.chunkerify(count, most)

    def chunked(text: str) -> list[str]:
        _, offsets = chunker(text, offsets=True)
        # Its chunks leave out the blanks between them.
        starts = [0, *(start for start, _ in offsets[1:]), len(text)]
        return [text[a:b] for a, b in pairwise(starts)]

    return {"ours": split, "semantic-text-splitter": merged.chunks, "semchunk": chunked}


def stretches(text: str, most: int, count: TokenCounter) -> Mapping[str, int]:
    """The stretches of a text between its landmarks, and their tokens; all of it, if that fits."""
    own = ranked_sentences(text, most, count)
    tokens, characters = offsets_of(own.sizes), own.places
    whole = len(own.texts) < 2 or tokens[-1] - own.blanks[-1] <= most
    inner = [] if whole else landmarks(own, most)
    borders = [0, *inner, len(own.texts)] if own.texts else []
    return {
        text[characters[a] : characters[b]].strip(): int(tokens[b] - own.blanks[b - 1] - tokens[a])
        for a, b in pairwise(borders)
    }


@dataclass(frozen=True)
class Figures:
    """What one way makes of documents; `new` are the new passages of each edit."""

    at_ends: float
    full: float
    new: np.ndarray
    seconds: float


def edits(given: Sequence[Document], count: int, seed: int) -> list[tuple[Document, Document]]:
    """So many edits of the documents in turn, each of a unit by one of another document."""
    draw = np.random.default_rng(seed)
    pairs = []
    for document in islice(cycle(given), count):
        other = given[int(draw.integers(len(given)))].units
        pairs.append((document, document.edited(other[int(draw.integers(len(other)))], draw)))
    return pairs


def measured(
    split: SplitText,
    given: Sequence[Document],
    edited: Sequence[tuple[Document, Document]],
    *,
    most: int,
) -> Figures:
    """Split every document and every edit."""
    count = TokenCounter(read_tokenizer(materialize(ModelSource(MINILM))))
    good = borders = passages = tokens = 0
    seconds, known = 0.0, {}
    for document in given:
        started = time.process_time()
        before = split(document.text)
        seconds += time.process_time() - started
        assert "".join(before) == document.text
        ends = np.cumsum([len(one) for one in before])[:-1]
        good += sum(int(end) in document.ends() for end in ends)
        borders += len(ends)
        passages += len(before)
        tokens += int(count([document.text])[0])
        known[document] = {one.strip() for one in before}
    new = [
        len({one.strip() for one in split(later.text)} - known[document])
        for document, later in edited
    ]
    full = tokens / (most * passages)
    return Figures(good / max(1, borders), full, np.array(new), seconds)


def forced(edited: Sequence[tuple[Document, Document]], *, most: int) -> tuple[np.ndarray, int]:
    """Whether the bound cuts a new stretch of each edit, and the most new stretches of any."""
    count = TokenCounter(read_tokenizer(materialize(ModelSource(MINILM))))
    cut, largest = [], 0
    for document, later in edited:
        known, after = (stretches(one.text, most, count) for one in (document, later))
        new = [tokens for stretch, tokens in after.items() if stretch not in known]
        cut.append(any(tokens > most for tokens in new))
        largest = max(largest, len(new))
    return np.array(cut), largest


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--kinds", nargs="*", help="of documents; all by default")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    # Before any tokenizer has made threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    most, claims = asked.max_tokens, []
    figures: dict[str, float] = {}
    with watched(PACKAGES, threads=1) as machine:
        ways = splitters(most)
        for kind, given in documents(asked.documents).items():
            if asked.kinds and kind not in asked.kinds:
                continue
            size = sum(len(one.text) for one in given)
            edited = edits(given, asked.edits, asked.seed)
            by = {way: measured(split, given, edited, most=most) for way, split in ways.items()}
            for way, made in by.items():
                figures |= {
                    f"{kind}, {way}, new passages of an edit": float(made.new.mean()),
                    f"{kind}, {way}, most new passages of an edit": float(made.new.max()),
                    f"{kind}, {way}, edits with more than three": float((made.new > 3).sum()),
                    f"{kind}, {way}, borders at ends of sentences": made.at_ends,
                    f"{kind}, {way}, fullness": made.full,
                    f"{kind}, {way}, characters/s": size / made.seconds,
                }
            more, (cut, largest) = by["ours"].new > 3, forced(edited, most=most)
            figures |= {
                f"{kind}, documents": float(len(given)),
                f"{kind}, ours, edits with more than three that the bound forced": float(
                    (more & cut).sum()
                ),
            }
            claims += [
                Claim(f"{kind}, most new stretches of an edit", float(largest), ceiling=3.0),
                Claim(
                    f"{kind}, more than three not forced", float((more & ~cut).sum()), ceiling=0.0
                ),
            ]
            for peer in [way for way in ways if way != "ours"]:
                ratio = float(by[peer].new.mean() / by["ours"].new.mean())
                floor = 1.0 if kind == "reviews" else None
                claims.append(Claim(f"{kind}, new passages, {peer} over ours", ratio, floor=floor))
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
