"""REUSE: before the flow, find the vectors that chunks take over, and gather them in Ray's store.

Keys alone are compared: a task hashes the texts of some chunks, another reads the hashes of some
old files, and both are joined partition by partition. Then each old file is opened once, and the
lines that chunks take over wait in Ray's store, which spills what its memory does not hold. What
cannot be read, or is lost, is embedded.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from embedjob.config.job import Input
from embedjob.errors import EmbedjobError
from embedjob.input.chunks import Chunk, passes, text_of
from embedjob.input.reading import read_pass
from embedjob.job.planning import JobPlan
from embedjob.job.reusable import OldFile, OldFiles, old_files
from embedjob.output.schema import ROW
from embedjob.stages.chunk_state import ChunkState, Failure
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.engine import Engine
from embedjob.stages.read import Then, memory_of, read
from embedjob.stages.reuse.merging import Reuse
from embedjob.stages.reuse.old_vectors import (
    Carried,
    Gathered,
    carried_of,
    gathered,
    old_keys,
)
from embedjob.stages.reuse.text_keys import (
    NO_TEXTS,
    PARTITION_KEYS,
    OldKeys,
    Places,
    TextKeys,
    all_of,
    hashes_of,
    in_order,
    join_partition,
    numbers_of,
)
from embedjob.stages.tokenize import distinct_texts, good_lines, tokenize
from embedjob.stages.write import Committer, write
from embedjob.storage.retrying import retried
from embedjob.text.arrays import Ints
from embedjob.text.conversations import text_hash
from embedjob.vectors.encoded import Encoded

# What one task takes: so much text, so many lines of old files, so many bytes of vectors.
_TEXT_BYTES, _LINES, _VECTOR_BYTES = 64 * 2**20, 524_288, 64 * 2**20
# To split so much text into passages takes a core half a minute.
_SPLIT_BYTES = 16 * 2**20
_MOST_GATHERS = 2000
_POLL_SECONDS = 0.5
# From a group to what its task gives: an object in Ray's store, and numbers for the driver.
_Start = Callable[[Sequence[Any]], tuple[Any, Any]]
Numbers = Counter[int]
TextsOf = Callable[[pa.Table], Sequence[str]]


def write_whole(
    plan: JobPlan, reuse: Reuse, engine: Engine, *, claim: ClaimAndCheck, ledger: Any
) -> None:
    """Read and write the chunks that are left, without encoders; each takes over all vectors.

    A chunk that needs an encoder after all, because old vectors were lost, is abandoned.
    """
    rows_of = partial(read_pass, job_input=plan.job.config.input)
    tokenized = partial(tokenize, engine=engine, files=claim.files, ledger=ledger)
    whole = partial(_whole, then=tokenized, width=plan.job.width)
    newest = plan.until is not None
    reading = partial(read, plan.left, rows_of, ledger=ledger, newest=newest, reuse=reuse)
    write(reading(whole, actors=1), Committer.of(plan, claim.lease), ledger=ledger)


def _whole(state: ChunkState, *, then: Then, width: int) -> ChunkState:
    """Return a state after `then` as WRITE takes it, abandoned where a text is left."""
    state = then(state)
    if state.failure or state.views is None:
        return state
    if state.views.texts:
        failure = Failure("abandoned", "some of its texts are to be embedded")
        return ChunkState(state.chunk, failure=failure)
    return replace(state, views=None, encoded=Encoded(np.empty((0, width), np.float32), {}))


def take_over(plan: JobPlan, engine: Engine, *, ledger: Any, say: Callable[[str], None]) -> Reuse:
    """Return the vectors that the chunks which are left take over.

    Nothing is compared where nothing is left, or no old file is there.

    Args:
        plan: the chunks, the output and its snapshots.
        engine: splits texts where their passages have the vectors.
        ledger: the run's ledger; a run that stops compares nothing more.
        say: takes a line about what was found.
    """
    files, carried = old_files(plan), carried_of(plan) if plan.left else None
    if carried is None or not len(files):
        return Reuse()
    tasks = _Tasks(ledger, plan.job.config.run.stall_seconds)
    found, wanted = _look_up(plan, engine, files, carried, tasks)
    joins, lines = found
    places = [place for place, _ in joins]
    gather = _task(_gathered)
    made = tasks.ended(
        lambda some: gather.remote(some, carried, *places),
        [files.take(group) for group in gather_groups(lines, carried)],
    )
    repeated = _by_chunk(plan.left, [one for _, one in joins])
    return _reuse(plan.left, wanted, made, repeated, say)


def rows_reusable(plan: JobPlan, engine: Engine) -> int:
    """Return the number of rows whose vectors a run would take over, as far as old files are sound.

    Reads and hashes all texts that are left, in this process. A row of passages counts where all
    of these have vectors.
    """
    files, carried = old_files(plan), carried_of(plan) if plan.left else None
    if carried is None or not len(files):
        return 0
    groups = _in_groups(range(len(files)), files.rows, _LINES)
    olds = [old_keys(files.take(group), carried) for group in groups]
    row_of, news = [np.empty(0, np.int64)], [NO_TEXTS]
    number = 0
    for together in passes(plan.left):
        read = partial(_lines_of_pass, together, _bare(plan), engine)
        with suppress(EmbedjobError, OSError):  # its run says why
            for rows, hashes in retried(read, what=together[0].shard.url):
                row_of.append(rows + (len(row_of) << 32))
                line = np.arange(number, number + len(rows), dtype=np.uint32)
                news.append(in_order(TextKeys(*numbers_of(hashes), line)))
                number += len(rows)
    parts = -(-(number + sum(len(one.high) for one in olds)) // PARTITION_KEYS)
    every, has = np.concatenate(row_of), np.zeros(number, np.bool_)
    for part in range(parts):
        has[join_partition(part, parts, news, olds)[0].chunk] = True
    return len(np.setdiff1d(every[has], every[~has]))


def _lines_of_pass(
    chunks: Sequence[Chunk], job_input: Input, engine: Engine
) -> list[tuple[Ints, bytes]]:
    """Return the rows of each chunk's good lines, and their hashes, one behind the other."""
    lines = (good_lines(rows, engine) for rows in read_pass(chunks, job_input))
    return [
        (
            one[ROW.name].to_numpy().astype(np.int64),
            b"".join(map(text_hash, one["text"].to_pylist())),
        )
        for one in lines
    ]


def _bare(plan: JobPlan) -> Input:
    """Return the input with what its texts are made of alone."""
    return plan.job.config.input.model_copy(update={"id": None, "keep": ()})


def _look_up(
    plan: JobPlan, engine: Engine, files: OldFiles, carried: Carried, tasks: "_Tasks"
) -> tuple[tuple[list[Any], Numbers], Numbers]:
    """Return what each partition has found, the lines of each file in it, and each chunk's texts.

    Of a partition there are two objects: the places of texts, and the texts to encode once.
    """
    texts, wanted = _text_keys(plan, engine, tasks)
    olds, there = _old_keys(files, carried, tasks)
    parts = -(-(sum(wanted.values()) + sum(there.values())) // PARTITION_KEYS)
    join = _task(_joined, num_returns=3)

    def start(some: Sequence[int]) -> tuple[tuple[Any, Any], Any]:
        places, repeated, lines = join.remote(some, parts, len(texts), *texts, *olds)
        return (places, repeated), lines

    found = tasks.outputs(start, [[part] for part in range(parts if texts and olds else 0)])
    return found, wanted


def _text_keys(plan: JobPlan, engine: Engine, tasks: "_Tasks") -> tuple[list[Any], Numbers]:
    """Return the keys of the chunks that are left, and how many texts each has, by its number."""
    hash_texts = _task(new_keys, memory=memory_of(plan.left))
    texts = partial(distinct_texts, engine=engine)
    most = _SPLIT_BYTES if engine.long_text == "split" else _TEXT_BYTES
    groups = [*_text_groups(plan.left, most)]
    return tasks.outputs(lambda some: hash_texts.remote(some, _bare(plan), texts), groups)


def _old_keys(files: OldFiles, carried: Carried, tasks: "_Tasks") -> tuple[list[Any], Numbers]:
    """Return the keys of old files, and how many of them each group of files has."""
    groups = [files.take(group) for group in _in_groups(range(len(files)), files.rows, _LINES)]
    hashes = _task(_counted_old)
    return tasks.outputs(lambda some: hashes.remote(some, carried), groups)


def _task(function: Callable[..., Any], **options: Any) -> Any:
    return ray.remote(function).options(**{"num_cpus": 1, "num_returns": 2, **options})


def new_keys(
    chunks: Sequence[tuple[int, Chunk]], job_input: Input, texts: TextsOf
) -> tuple[TextKeys, dict[int, int]]:
    """Return the keys of chunks' good texts, in order, and how many each chunk has by its number.

    `texts` gives the distinct ones of rows. A chunk that cannot be read has none: the flow reads it
    again, and says why.
    """
    numbers = {chunk.key: number for number, chunk in chunks}
    keys: list[TextKeys] = []
    for together in passes(chunk for _, chunk in chunks):
        read = partial(_keys_of_pass, together, numbers, job_input, texts)
        try:
            keys += retried(read, what=together[0].shard.url)
        except (EmbedjobError, OSError):
            continue
    counts = {int(one.chunk[0]): len(one.chunk) for one in keys if len(one.chunk)}
    return in_order(all_of(keys, NO_TEXTS)), counts


def _keys_of_pass(
    chunks: Sequence[Chunk], numbers: Mapping[str, int], job_input: Input, texts: TextsOf
) -> list[TextKeys]:
    made = []
    for chunk, rows in zip(chunks, read_pass(chunks, job_input), strict=True):
        high, low = numbers_of(b"".join(map(text_hash, texts(rows))))
        made.append(TextKeys(high, low, np.full(len(high), numbers[chunk.key], np.uint32)))
    return made


def _counted_old(
    files: Sequence[tuple[int, OldFile]], carried: Carried
) -> tuple[OldKeys, dict[int, int]]:
    keys = old_keys(files, carried)
    return keys, {files[0][0]: len(keys.high)}


def _joined(
    some: Sequence[int], parts: int, texts: int, *keys: Any
) -> tuple[Places, TextKeys, dict[int, int]]:
    """Return the places of one partition, its repeated texts, and the lines wanted of each file."""
    [part] = some
    places, repeated = join_partition(part, parts, keys[:texts], keys[texts:])
    files, firsts = np.unique(places.file, return_index=True)
    lines = np.add.reduceat(places.lines.astype(np.int64), firsts) if len(files) else files
    return places, repeated, dict(zip(files.tolist(), map(int, lines), strict=True))


def _by_chunk(chunks: Sequence[Chunk], found: Sequence[Any]) -> dict[str, bytes]:
    """Return the hashes of repeated texts by chunk; a partition that was lost gives none."""
    parts: list[TextKeys] = []
    for one in found:
        with suppress(RayError):
            parts.append(ray.get(one))
    every = all_of(parts, NO_TEXTS)
    order = np.argsort(every.chunk, kind="stable")
    hashes = hashes_of(every.high[order], every.low[order]).buffers()[1].to_pybytes()
    numbers, firsts = np.unique(every.chunk[order], return_index=True)
    ends = np.append(firsts, len(order))[1:]
    return {
        chunks[number].key: hashes[16 * first : 16 * end]
        for number, first, end in zip(numbers.tolist(), firsts, ends, strict=True)
    }


def _gathered(
    files: Sequence[tuple[int, OldFile]], carried: Carried, *places: Places
) -> tuple[pa.Table, dict[int, int]]:
    made: Gathered = gathered(files, places, carried)
    return made.table, dict(zip(made.numbers.tolist(), made.texts.tolist(), strict=True))


class _Tasks:
    """Runs tasks over groups; a group whose task ends its process is run again, one by one.

    Each task gives an object that stays in Ray's store, and numbers for the driver.
    """

    def __init__(self, ledger: Any, stall_seconds: float) -> None:
        self._ledger, self._stall_seconds = ledger, stall_seconds

    def outputs(self, start: _Start, groups: Sequence[Sequence[Any]]) -> tuple[list[Any], Numbers]:
        """Return the objects in the order of the groups, and the sums of the numbers."""
        made, numbers = self.ended(start, groups), Numbers()
        for _, counts in made:
            numbers.update(counts)
        return [one for one, _ in made], numbers

    def ended(
        self, start: _Start, groups: Sequence[Sequence[Any]]
    ) -> list[tuple[Any, Mapping[int, int]]]:
        """Return the object and the numbers of each group.

        A group, or a member of it, that gives none is left out; all are where the run stops.
        """
        made, failed = self._waited(start, groups)
        alone = [[one] for group in failed if len(group) > 1 for one in group]
        return made + self._waited(start, alone)[0]

    def _waited(
        self, start: _Start, groups: Sequence[Sequence[Any]]
    ) -> tuple[list[tuple[Any, Mapping[int, int]]], list[Sequence[Any]]]:
        begun = [start(group) for group in groups]
        waiting = {counts: number for number, (_, counts) in enumerate(begun)}
        made: dict[int, tuple[Any, Mapping[int, int]]] = {}
        failed, moved = [], time.monotonic()
        while waiting and time.monotonic() - moved < self._stall_seconds:
            if ray.get(self._ledger.stopping.remote()):
                break
            ready, _ = ray.wait([*waiting], num_returns=len(waiting), timeout=_POLL_SECONDS)
            for counts in ready:
                number, moved = waiting.pop(counts), time.monotonic()
                try:
                    made[number] = (begun[number][0], ray.get(counts))
                except RayError:
                    failed.append(groups[number])
            # No encoder is needed for this, and the run waits for none.
            self._ledger.goes_on.remote()
        for counts in waiting:
            ray.cancel(counts, force=True)
        return [made[number] for number in sorted(made)], failed


def _text_groups(chunks: Sequence[Chunk], most: int) -> Iterator[list[tuple[int, Chunk]]]:
    """Yield chunks with their numbers, those of one pass together, in groups of much text."""
    numbers = {chunk.key: number for number, chunk in enumerate(chunks)}
    together = passes(chunks)
    for group in _in_groups(range(len(together)), [*map(text_of, together)], most):
        yield [(numbers[chunk.key], chunk) for place in group for chunk in together[place]]


def gather_groups(lines: Mapping[int, int], carried: Carried) -> list[list[int]]:
    """Return files in groups of enough vectors; files of which nothing is wanted are left out."""
    kind = carried.fields.field("embedding").type
    line = kind.list_size * kind.value_type.bit_width // 8
    files = sorted(lines)
    sizes = [lines[file] * line for file in files]
    return [*_in_groups(files, sizes, max(_VECTOR_BYTES, sum(sizes) // _MOST_GATHERS))]


def _in_groups(members: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the members in order, in groups that end as soon as they have the size `most`."""
    group: list[int] = []
    held = 0
    for member, size in zip(members, sizes, strict=True):
        group.append(member)
        held += size
        if held >= most:
            yield group
            group, held = [], 0
    if group:
        yield group


def _reuse(
    chunks: Sequence[Chunk],
    wanted: Mapping[int, int],
    made: Sequence[tuple[Any, Mapping[int, int]]],
    repeated: Mapping[str, bytes],
    say: Callable[[str], None],
) -> Reuse:
    objects: dict[int, list[Any]] = defaultdict(list)
    texts: Counter[int] = Counter()
    for one, counts in made:
        texts.update(counts)
        for number in counts:
            objects[number].append(one)
    whole = frozenset(chunks[number].key for number in texts if texts[number] == wanted[number])
    places = {chunks[number].key: (number, (*own,)) for number, own in objects.items()}
    say(
        f"reuse: {sum(texts.values()):,} of {sum(wanted.values()):,} texts have their vectors in"
        f" files of earlier runs; {len(whole):,} of {len(chunks):,} chunks need no encoder"
    )
    return Reuse(places, whole, repeated)
