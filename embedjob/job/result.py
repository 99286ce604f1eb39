"""The result of a run: the outcome of each chunk, the tally meanwhile, the summary at the end."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from embedjob.output.chunk_file import Committed
from embedjob.output.manifest import FILES, as_table, sums_of
from embedjob.output.snapshot import LeftShard

_FILES = pa.schema([("name", pa.string()), *map(FILES.field, ("rows", "etag", "counts"))])
_AT_ONCE = 4096
_TIMES = {
    "wait": "wait_seconds",
    "tokenize": "tokenize_seconds",
    "compute": "compute_seconds",
    "copy": "copy_seconds",
}


@dataclass(frozen=True)
class Outcome:
    """The end of one chunk: committed with its counts, or a fault."""

    key: str
    shard: str
    start: int
    stop: int
    committed: Committed | None = None
    fault: str | None = None
    stats: Mapping[str, float] = field(default_factory=dict)


class Outcomes:
    """How chunks ended: committed files as columns, faults as they are, statistics as sums.

    In columns a million files take some 200 MB, an eighth of what they take as objects. `stats`
    sums the committed chunks' statistics.
    """

    def __init__(self, ends: Iterable[Outcome] = ()) -> None:
        """Begin with these ends."""
        self.faults: list[Outcome] = []
        self.stats: Counter[str] = Counter()
        self._files: list[pa.Table] = [_FILES.empty_table()]
        self._latest: list[Committed] = []
        for end in ends:
            self.add(end)

    def add(self, end: Outcome) -> None:
        """Note the end of a further chunk."""
        if end.committed is None:
            self.faults.append(end)
            return
        self.stats.update(end.stats)
        self._latest.append(end.committed)
        if len(self._latest) == _AT_ONCE:
            self._files.append(as_table(self._latest, _FILES))
            self._latest = []

    @property
    def files(self) -> pa.Table:
        """The committed files: name, rows, etag, counts."""
        return pa.concat_tables([*self._files, as_table(self._latest, _FILES)])

    @property
    def committed(self) -> int:
        """The number of committed chunks."""
        return sum(map(len, self._files)) + len(self._latest)

    def __len__(self) -> int:
        """Return the number of chunks that ended."""
        return self.committed + len(self.faults)


@dataclass(frozen=True)
class Tally:
    """The state of a run at one moment; `chunk_tokens` and `text_bytes` count ended chunks alone.

    `reused` are the rows of ended chunks whose vectors were there already.

    `idle_seconds` are those without progress while encoders were there, `absent_seconds` those
    since one was last heard of. `answers` are those of generators, and `answer_tokens` the tokens
    of those that were made now; nothing is left to be generated for `chunks_generated`.
    `late` is whether a chunk was not begun because of the deadline.
    """

    chunks: int
    faults: int
    rows: int
    tokens: int
    chunk_tokens: int
    text_bytes: int
    actors: int
    in_hand: int
    refusal: str | None
    idle_seconds: float
    absent_seconds: float = 0.0
    answers: int = 0
    answer_tokens: int = 0
    chunks_generated: int = 0
    late: bool = False
    reused: int = 0


@dataclass(frozen=True)
class StagesEnd:
    """How the stages of a run ended; `outcomes` is None where Ray was lost before it was asked.

    `error` is what stopped them early, None where every chunk has an outcome; `notes` are the
    warnings of the encoders, each once. `late` is why the deadline may have left some chunks
    without one; None where it did not.
    """

    outcomes: Outcomes | None = field(default_factory=Outcomes)
    error: Exception | None = None
    notes: tuple[str, ...] = ()
    late: str | None = None


@dataclass(frozen=True)
class Summary:
    """What `run` prints; `rows = embedded + reused + deduplicated + nulls + quarantined`.

    `reused` are rows whose vectors were taken over from files of earlier runs.
    `files_not_read` lie beside the shards, and `not_read` says what some of them are.
    `rows_before` and the shards added, changed and removed compare the corpus with that of the
    snapshot that was served when the run began.

    `tokens` went through the model; equal texts count once. `flops_utilization` is the model's
    FLOPs in the encoders' compute seconds, as a share (at most 1) of what the device does at its
    fastest, measured by a matmul or a pass. Compute seconds are all time spent on a chunk, except
    waiting for it and copying from a GPU.

    `generated` are the texts that this run's generator made, of `generated_tokens` together, and
    `generations_reused` those that were there already. `generation_fallbacks` counts those of both
    kinds for which the generator failed or gave no text: the row's own text takes their place.

    `chunks_left` of `shards_left` could not be done before the run's deadline.

    `passages` are those of this run's rows, where texts are split; a row counts as embedded where
    one of its passages is new to its chunk, and as quarantined where one is. Of the passages,
    `passages_reused` took vectors over.
    """

    rows: int
    embedded: int
    reused: int
    deduplicated: int
    nulls: int
    quarantined: int
    files_not_read: int
    not_read: str
    rows_before: int
    shards_added: int
    shards_changed: int
    shards_removed: int
    vectors: int
    chunks_planned: int
    chunks_done_before: int
    chunks_written: int
    chunks_failed: int
    tokens: int
    prefix_tokens_saved: int
    padding_share: float
    truncated: int
    seconds: float
    tokens_per_second: float
    flops_utilization: float | None
    time_share: Mapping[str, float]
    fingerprint: str
    snapshot: str | None
    generated: int = 0
    generated_tokens: int = 0
    generations_reused: int = 0
    generation_fallbacks: int = 0
    chunks_left: int = 0
    shards_left: int = 0
    passages: int = 0
    passages_reused: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Drift:
    """How a corpus differs from the corpus that is served: its rows before, and its shards."""

    files_not_read: int = 0
    not_read: str = ""
    rows_before: int = 0
    shards_added: int = 0
    shards_changed: int = 0
    shards_removed: int = 0


@dataclass(frozen=True)
class RunFacts:
    """What a summary needs beside the outcomes."""

    chunks_planned: int
    chunks_done_before: int
    seconds: float
    fingerprint: str
    snapshot: str | None = None
    drift: Drift = Drift()


def summarize(outcomes: Outcomes, facts: RunFacts) -> Summary:
    """Sum up a run; its rows and tokens are those of the chunks that it committed."""
    counts, stats = Counter(sums_of(outcomes.files["counts"])), outcomes.stats
    shares = {name: stats[key] for name, key in _TIMES.items()}
    known = sum(shares.values())
    tokens, padded = int(stats["forward_tokens"]), stats["padded_tokens"]
    return Summary(
        rows=counts["rows"],
        embedded=counts["embedded"],
        reused=counts["reused"],
        deduplicated=counts["deduplicated"],
        nulls=counts["nulls"],
        quarantined=counts["quarantined"],
        **asdict(facts.drift),
        vectors=int(stats["distinct_views"]),
        chunks_planned=facts.chunks_planned,
        chunks_done_before=facts.chunks_done_before,
        chunks_written=outcomes.committed,
        chunks_failed=len(outcomes.faults),
        tokens=tokens,
        prefix_tokens_saved=int(stats["prefix_tokens_saved"]),
        padding_share=round(1 - tokens / padded, 4) if padded else 0.0,
        truncated=counts["truncated"],
        seconds=round(facts.seconds, 3),
        tokens_per_second=round(tokens / facts.seconds, 1) if facts.seconds else 0.0,
        flops_utilization=_share(stats["model_flops"], stats["peak_flops"]),
        time_share={k: round(v / known, 4) if known else 0.0 for k, v in shares.items()},
        fingerprint=facts.fingerprint,
        snapshot=facts.snapshot,
        generated=int(stats["generated"]),
        generated_tokens=int(stats["generated_tokens"]),
        generations_reused=int(stats["generations_reused"]),
        generation_fallbacks=int(stats["generation_fallbacks"]),
        passages=int(stats["passages"]),
        passages_reused=int(stats["passages_reused"]),
    )


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


@dataclass(frozen=True)
class Result:
    """How a run ended: its numbers, its faults, a verdict in words, and the encoders' notes.

    `left` are the shards that its deadline left for the next run.
    """

    summary: Summary
    out: str
    faults: tuple[str, ...]
    verdict: str
    notes: tuple[str, ...] = ()
    left: tuple[LeftShard, ...] = ()

    @property
    def exit_code(self) -> int:
        """The exit code: 0 if all is done, 1 if there are faults, 3 if a deadline left shards."""
        if self.faults:
            return 1
        return 3 if self.left else 0
