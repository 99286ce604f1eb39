"""Ends of chunks as the ledger keeps them."""

from collections.abc import Mapping

from embedjob.job.result import Outcome
from embedjob.output.chunk_file import Committed


def outcome(
    key: str, *, fault: str | None = None, stats: Mapping[str, float] | None = None
) -> Outcome:
    counts = {
        "rows": 10,
        "embedded": 6,
        "deduplicated": 2,
        "quarantined": 1,
        "nulls": 1,
        "truncated": 3,
        "tokens": 70,
    }
    told = {
        "rows": 10,
        "forward_tokens": 50,
        "padded_tokens": 80,
        "distinct_views": 6,
        "wait_seconds": 1.0,
        "tokenize_seconds": 1.0,
        "compute_seconds": 2.0,
        **(stats or {}),
    }
    kept = None if fault else Committed(key, 9, 100, "etag", counts, written=True)
    return Outcome(key=key, shard="s", start=0, stop=10, committed=kept, fault=fault, stats=told)
