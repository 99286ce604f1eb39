"""Merging: the vectors that a chunk takes over, and its rows with old and new ones in order.

A chunk stays whole on its way: READ attaches old lines, TOKENIZE and ENCODE see the texts that are
left, and WRITE puts the lines of both together in the order of its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError

from embedjob.input.chunks import Chunk
from embedjob.output.schema import PART, ROW, STORED, TEXT_HASH
from embedjob.stages.chunk_state import ChunkState
from embedjob.stages.reuse.text_keys import column_numbers
from embedjob.text.arrays import Ints, offsets_of

# Of a row whose vectors lie in an old file: the first of its lines among those that its chunk has.
TAKEN = "taken"
# Of an old line in Ray's store: the number of the chunk that takes it over.
CHUNK = "chunk"
# An object that a lost node held is made again in this time, or its texts are embedded.
_FETCH_SECONDS = 300.0


@dataclass(frozen=True)
class Reuse:
    """The vectors that chunks take over: by chunk, its number and the objects in Ray's store.

    `whole` are the chunks whose every good row has one. `repeated` are, by chunk, the hashes of its
    texts that have none, and that other chunks have too, one behind the other.
    """

    places: Mapping[str, tuple[int, tuple[Any, ...]]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    repeated: Mapping[str, bytes] = field(default_factory=dict)

    def of(self, chunks: Sequence[Chunk]) -> "Reuse":
        """Return what concerns these chunks, to travel with them."""
        keys = [chunk.key for chunk in chunks]
        return Reuse(
            {key: self.places[key] for key in keys if key in self.places},
            repeated={key: self.repeated[key] for key in keys if key in self.repeated},
        )

    def attached(self, state: ChunkState) -> ChunkState:
        """Return a state with the old lines of its texts; without, where they were lost."""
        if repeated := self.repeated.get(state.chunk.key):
            state = replace(state, repeated=repeated)
        number, objects = self.places.get(state.chunk.key, (0, ()))
        if not objects or state.failure or state.rows is None:
            return state
        try:
            tables = ray.get([*objects], timeout=_FETCH_SECONDS)
        except RayError:
            return state
        return replace(state, reused=pa.concat_tables([_of_chunk(one, number) for one in tables]))


NO_REUSE = Reuse()


def _of_chunk(table: pa.Table, number: int) -> pa.Table:
    start, stop = np.searchsorted(table[CHUNK].to_numpy(), [number, number + 1])
    return table.slice(start, stop - start).drop_columns([CHUNK])


def lines_of_texts(hashes: Sequence[bytes], reused: pa.Table | None) -> Ints:
    """Return the first old line of each text, by its hash; -1 where there is none [texts]."""
    if reused is None or not hashes:
        return np.full(len(hashes), -1, np.int64)
    found = pc.index_in(pa.array(hashes, TEXT_HASH), value_set=reused["text_hash"])
    first: Ints = found.fill_null(-1).to_numpy().astype(np.int64)
    return first


def merged(made: pa.Table, taken: pa.Table, reused: pa.Table) -> pa.Table:
    """Return a chunk's lines in order: those that were made, and those of old files.

    Args:
        made: lines with embeddings or reasons.
        taken: the other rows, whose TAKEN points at lines of `reused`.
        reused: lines of old files, those of one text together, their vectors as they are stored.
    """
    first = taken[TAKEN].to_numpy().astype(np.int64)
    counts = _lines_of_each(reused)[first]
    offsets = offsets_of(counts)
    source = np.repeat(np.arange(len(first)), counts)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    lines = reused.take(pa.array(first[source] + within))
    if PART.name in taken.column_names:  # of a passage, these lines say it with its new heading
        lines = lines.drop_columns(["truncated"])
    names = lines.column_names
    lines = lines.rename_columns([STORED if name == "embedding" else name for name in names])
    # What an old file says of a text takes the place of what is known before tokenizing.
    gone = {TAKEN, "unique", *names}
    rows = taken.drop_columns([name for name in taken.column_names if name in gone])
    spread = rows.take(pa.array(source))
    for name in lines.column_names:
        spread = spread.append_column(name, lines[name])
    if PART.name in lines.column_names and PART.name not in made.column_names:
        made = made.append_column(PART, pa.array(np.zeros(len(made)), pa.uint32()))
    every = pa.concat_tables([made, spread], promote_options="default")
    places = [
        every[name].to_numpy() for name in (PART.name, ROW.name) if name in every.column_names
    ]
    return every.take(pa.array(np.lexsort(places)))


def _lines_of_each(reused: pa.Table) -> Ints:
    """Return the number of lines from each line to the last line of its text."""
    high, low = column_numbers(reused["text_hash"])
    ends = np.ones(len(high), np.bool_)
    ends[:-1] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    last = np.flatnonzero(ends)
    places = np.arange(len(high))
    return last[np.searchsorted(last, places)] - places + 1
