"""Term counts of a corpus by Ray tasks: each reads some chunks, and counts are added by partition.

A term belongs to the partition that its hash says. A task gives one table for each partition, and
another task adds the tables of a partition: no process ever holds the counts of all terms, and what
comes back to the driver are those that the vocabulary keeps. Sums of whole numbers are the same in
any order.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError

from embedjob.config.job import Input
from embedjob.errors import FitError
from embedjob.input.chunks import Chunk, passes
from embedjob.input.reading import read_pass
from embedjob.stages.chunk_state import raised_in_worker
from embedjob.stages.read import memory_of
from embedjob.storage.retrying import retried
from embedjob.text.lookup.terms import TermCounts, TermRules, count_terms
from embedjob.vectors.fits.fitted import Fitted
from embedjob.vectors.vocabulary import Vocabulary, bounds

# A task counts so many rows, or so much text: it holds the terms of all of it.
_GROUP_ROWS, _GROUP_BYTES = 131_072, 1 << 28
_PARTITIONS = 16
# So many groups are counted before their tables are added: their tables wait in Ray's store.
_GROUPS_AT_ONCE = 64
UNCOUNTED = "texts cannot be counted"
# The driver and every worker hold the vocabulary.
MOST_TERMS = 50_000_000
_SCHEMA = pa.schema(
    [("term", pa.large_string()), ("documents", pa.int64()), ("occurrences", pa.int64())]
)


def counted_vocabulary(chunks: Sequence[Chunk], job_input: Input, section: Any) -> Fitted:
    """Return the vocabulary of all good rows of chunks, by a fit's section.

    Raises:
        FitError: no term is left, or more than a process should hold.
        FaultError: a chunk cannot be read, or the cluster is lost.
    """
    rules = TermRules(section.lowercase, section.token_pattern)
    try:
        texts, partitions = _partitions(chunks, job_input, rules)
        fewest, most = bounds(section, texts)
        keep, count = ray.remote(kept), ray.remote(number_of)
        left = [keep.remote(one, fewest, most, section.max_features) for one in partitions]
        if section.max_features is None:
            _check_number(sum(ray.get([count.remote(one) for one in left])))
        tables = ray.get(left)
    except RayError as error:
        raise raised_in_worker(error, UNCOUNTED) from error
    table = most_frequent(pa.concat_tables(tables), section.max_features)
    if not len(table):
        raise FitError(
            f"no term of {texts} texts is left: token_pattern {section.token_pattern!r} matches"
            f" none, or min_df: {section.min_df} and max_df: {section.max_df} leave none out of all"
        )
    return vocabulary(table, texts, rules).fitted()


def _check_number(terms: int) -> None:
    """Raise FitError where a process could not hold so many terms."""
    if terms > MOST_TERMS:
        raise FitError(
            f"got {terms:,} terms, allowed are {MOST_TERMS:,}: every process holds all of them; set"
            " min_df or max_features"
        )


def vocabulary(table: pa.Table, texts: int, rules: TermRules) -> Vocabulary:
    """Return the vocabulary of a table of terms, in the order of their code points."""
    terms = table["term"].to_pylist()
    # As Python orders strings: the order of UTF-8 bytes is the same.
    order = np.array(sorted(range(len(terms)), key=terms.__getitem__), np.int64)
    documents_V = table["documents"].to_numpy()[order]
    in_order = [terms[place] for place in order]
    return Vocabulary(in_order, documents_V, texts, rules.lowercase, rules.token_pattern)


def _partitions(
    chunks: Sequence[Chunk], job_input: Input, rules: TermRules
) -> tuple[int, list[Any]]:
    """Return the number of texts, and references to the counts of each partition."""
    # Ray's types know one result alone.
    count: Any = ray.remote(count_group).options(
        num_cpus=1, num_returns=1 + _PARTITIONS, memory=memory_of(chunks)
    )
    add = ray.remote(added).options(num_cpus=1)
    texts = 0
    partitions: list[Any] = [ray.put(_SCHEMA.empty_table()) for _ in range(_PARTITIONS)]
    groups = [*grouped(chunks)]
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        some = groups[start : start + _GROUPS_AT_ONCE]
        made = [count.remote(group, job_input, rules) for group in some]
        partitions = [
            add.remote(partition, *(one[1 + number] for one in made))
            for number, partition in enumerate(partitions)
        ]
        texts += sum(ray.get([one[0] for one in made]))
        ray.wait(partitions, num_returns=len(partitions))
    return texts, partitions


def grouped(
    chunks: Sequence[Chunk], *, rows: int = _GROUP_ROWS, size: int = _GROUP_BYTES
) -> Iterator[tuple[Chunk, ...]]:
    """Yield groups of at least so many rows or bytes; the chunks of a pass stay together."""
    group: list[Chunk] = []
    held_rows = held_bytes = 0
    for together in passes(chunks):
        group += together
        held_rows += sum(chunk.rows for chunk in together)
        held_bytes += sum(chunk.text_bytes for chunk in together)
        if held_rows >= rows or held_bytes >= size:
            yield tuple(group)
            group, held_rows, held_bytes = [], 0, 0
    if group:
        yield tuple(group)


def count_group(group: Sequence[Chunk], job_input: Input, rules: TermRules) -> tuple[Any, ...]:
    """Return the number of good rows in some chunks, and their counts by partition."""
    counts = TermCounts(0, Counter(), Counter())
    for texts in good_texts(group, job_input):
        count_terms(texts, rules, counts)
    return (counts.texts, *by_partition(counts))


def good_texts(group: Sequence[Chunk], job_input: Input) -> Iterator[list[str]]:
    """Yield the texts of each chunk that are no bad rows."""
    for _, rows in good_rows(group, job_input):
        yield rows["text"].to_pylist()


def good_rows(group: Sequence[Chunk], job_input: Input) -> Iterator[tuple[Chunk, pa.Table]]:
    """Yield each chunk with its rows that are no bad ones."""
    for together in passes(group):
        # As a whole: a read that is cut off half-way begins anew.
        read = partial(_read, together, job_input)
        for chunk, rows in zip(together, retried(read, what=together[0].shard.url), strict=True):
            yield chunk, rows.filter(rows["reason"].is_null())


def _read(together: Sequence[Chunk], job_input: Input) -> list[pa.Table]:
    return [*read_pass(together, job_input)]


def by_partition(counts: TermCounts) -> list[pa.Table]:
    """Return counts as a table for each partition."""
    parts: list[list[str]] = [[] for _ in range(_PARTITIONS)]
    for term in counts.documents:
        parts[zlib.crc32(term.encode("utf-8", "surrogatepass")) % _PARTITIONS].append(term)
    return [
        pa.table(
            [
                terms,
                [counts.documents[term] for term in terms],
                [counts.occurrences[term] for term in terms],
            ],
            schema=_SCHEMA,
        )
        for terms in parts
    ]


def added(*tables: pa.Table) -> pa.Table:
    """Return the sums of the counts of each term."""
    both = pa.concat_tables(tables).group_by("term", use_threads=False)
    sums = both.aggregate([("documents", "sum"), ("occurrences", "sum")])
    return sums.rename_columns(["term", "documents", "occurrences"]).cast(_SCHEMA)


def kept(table: pa.Table, fewest: int, most: int, limit: int | None) -> pa.Table:
    """Return the terms of a partition that a vocabulary may keep."""
    documents = table["documents"]
    inside = pc.and_(pc.greater_equal(documents, fewest), pc.less_equal(documents, most))
    return most_frequent(table.filter(inside), limit)


def number_of(table: pa.Table) -> int:
    """Return how many terms a partition has."""
    return len(table)


def most_frequent(table: pa.Table, limit: int | None) -> pa.Table:
    """Return the terms that occur most often, of equals the first in order; all without a limit."""
    if limit is None or len(table) <= limit:
        return table
    return table.sort_by([("occurrences", "descending"), ("term", "ascending")]).slice(0, limit)
