"""TOKENIZE: texts become token ids, in the CPU task that has read them."""

import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from embedjob.errors import RefusedError
from embedjob.input.reading import HEADING
from embedjob.output.schema import CHARS, ROW
from embedjob.stages.attempts import begin_attempt, limited
from embedjob.stages.chunk_state import ChunkState, Failure, describe
from embedjob.stages.engine import Engine, PlannedFiles
from embedjob.stages.reuse.merging import TAKEN, lines_of_texts
from embedjob.text.arrays import Flags, Ints
from embedjob.text.conversations import text_hash
from embedjob.text.variants import views_with_variants
from embedjob.text.views import Splits, TokenizesTexts, TokenViews

EXCERPT_CHARACTERS = 200
# The column of texts that a generator made of a row's text.
VARIANTS = "variants"
Labels = npt.NDArray[np.object_]


def tokenize(state: ChunkState, *, engine: Engine, files: PlannedFiles, ledger: Any) -> ChunkState:
    """Return the state with hashes and excerpts, and ids in place of texts.

    A worker whose tokenizer is not the one of `files` stops the run.
    """
    if state.failure:
        return state
    chunk = state.chunk
    attempt = begin_attempt("tokenize", chunk.key, ledger, size=chunk.text_bytes)
    if isinstance(attempt, Failure):
        return ChunkState(chunk, failure=attempt, stats=state.stats)
    try:
        with limited(attempt.seconds):
            ended = tokenize_state(state, engine)
            _check(files)
    except RefusedError as error:
        ray.get(ledger.refuse.remote(str(error)))
        return ChunkState(chunk, failure=Failure("abandoned", str(error)), stats=state.stats)
    return ended


def tokenize_state(state: ChunkState, engine: Engine) -> ChunkState:
    """Return the state with ids in place of texts; a state that failed earlier is unchanged."""
    if state.failure or state.rows is None:
        return state
    started = time.monotonic()
    try:
        tokenizer = _tokenizer(engine)
        rows, views = tokenize_rows(state.rows, tokenizer, engine.long_text, state.reused)
        passages = _passages_in(rows)
    except Exception as error:  # a fault of one chunk; the others go on
        failure = Failure("fault", describe(error))
        return ChunkState(state.chunk, failure=failure, stats=state.stats)
    seconds = time.monotonic() - started
    stats = {**state.stats, **passages, "tokenize_seconds": seconds}
    if state.reused is not None:
        stats |= _reused_in(rows)
    return replace(state, rows=rows, views=views, stats=stats)


def tokenize_rows(
    rows: pa.Table, tokenizer: TokenizesTexts, long_text: str, reused: pa.Table | None = None
) -> tuple[pa.Table, TokenViews]:
    """Return the rows without their text, and the views of their distinct good texts.

    Equal texts are tokenized once: `unique` points each good row at its text, in order of first
    appearance, and is null for bad rows. With `reused`, texts that have old lines there are not
    encoded: `taken` points at the first of them, and is null for the other rows. Where texts are
    split, a line of each passage takes the place of its row, and the passages are the texts.
    """
    if tokenizer.splitter is not None:
        lines = passage_lines(rows, tokenizer.splitter)
        cut = lines["cut"]
        rows, views = _tokenized(lines.drop_columns(["cut"]), tokenizer, long_text, reused)
        place = rows.schema.get_field_index("truncated")
        return rows.set_column(place, "truncated", pc.or_(rows["truncated"], cut)), views
    return _tokenized(rows, tokenizer, long_text, reused)


def good_lines(rows: pa.Table, engine: Engine) -> pa.Table:
    """Return the lines of good rows, which are their passages where texts are split."""
    rows = rows.filter(rows["reason"].is_null())
    # A tokenizer takes a second to load, and whole texts need none.
    splitter = _tokenizer(engine).splitter if engine.long_text == "split" else None
    return rows if splitter is None else passage_lines(rows, splitter)


def distinct_texts(rows: pa.Table, engine: Engine) -> list[str]:
    """Return the distinct good texts of rows, which are their passages where texts are split."""
    texts: list[str] = good_lines(rows, engine)["text"].unique().to_pylist()
    return texts


def passage_lines(rows: pa.Table, splitter: Splits) -> pa.Table:
    """Return a line for each passage of the rows, with its text, and one for each bad row.

    They have `part`, `char_start` and `char_stop`, characters of the text as read, and no heading:
    it stands in the passage's text; `cut` says that it was too long.
    """
    texts, headings = rows["text"].to_pylist(), [None] * len(rows)
    if HEADING in rows.column_names:
        headings = rows[HEADING].to_pylist()
        rows = rows.drop_columns([HEADING])
    keys = [*zip(texts, headings, strict=True)]
    places: dict[tuple[str, str | None], int] = {}
    for text, heading in keys:
        if text is not None:
            places.setdefault((text, heading), len(places))
    passages = splitter([text for text, _ in places], [heading for _, heading in places])
    # A bad row has one line: the empty one behind all passages.
    firsts = passages.offsets
    sizes = np.append(np.diff(firsts), 1)
    which = np.array([places.get(key, len(places)) for key in keys], np.int64)
    source, part = _numbered(sizes[which])
    line = pa.array(firsts[which][source] + part)
    # Without the texts: a long one would be repeated for each of its passages.
    spread = rows.drop_columns(["text"]).take(pa.array(source))
    columns = {
        "part": pa.array(part, pa.uint32()),
        "text": pa.array([*passages.texts, None], pa.large_string()).take(line),
        "cut": pa.array([*passages.cut.tolist(), False]).take(line),
    }
    for place, name in enumerate(CHARS):
        chars = pa.array([*passages.chars[:, place].tolist(), None], pa.uint32())
        columns[name] = chars.take(line)
    for name, column in columns.items():
        spread = spread.append_column(name, column)
    return spread


def _numbered(counts: Ints) -> tuple[Ints, Ints]:
    """Return the row of each of its so many lines, and the number of the line in the row."""
    source = np.repeat(np.arange(len(counts)), counts)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)


def _passages_in(rows: pa.Table) -> dict[str, float]:
    """Return the number of passages among the lines of rows; nothing where texts are not split."""
    split = CHARS[0] in rows.column_names
    return {"passages": pc.count(rows[CHARS[0]]).as_py()} if split else {}


def _reused_in(rows: pa.Table) -> dict[str, float]:
    """Return how many rows have their vectors already, and how many passages where texts are split.

    A row of passages has them once the last one has.
    """
    taken = rows[TAKEN].is_valid().to_numpy()
    if CHARS[0] not in rows.column_names:
        return {"reused": int(taken.sum())}
    numbers = rows[ROW.name].to_numpy()
    whole = np.setdiff1d(numbers[taken], numbers[~taken])
    return {"reused": len(whole), "passages_reused": int(taken.sum())}


def _tokenized(
    rows: pa.Table, tokenizer: TokenizesTexts, long_text: str, reused: pa.Table | None = None
) -> tuple[pa.Table, TokenViews]:
    coded = pc.dictionary_encode(rows["text"].combine_chunks())
    every = coded.dictionary.to_pylist()
    hashes = [text_hash(text) for text in every]
    old = lines_of_texts(hashes, reused)
    taken = old >= 0
    left = np.flatnonzero(~taken | _unclear(rows, old, reused))
    texts = every if len(left) == len(every) else [every[number] for number in left.tolist()]
    if VARIANTS in rows.column_names:
        firsts = pc.index_in(pa.array(left, pa.int64()), coded.indices.cast(pa.int64()))
        variants = rows[VARIANTS].combine_chunks().take(firsts).to_pylist()
        views = views_with_variants(tokenizer, texts, variants)
        rows = rows.drop_columns([VARIANTS])
    else:
        views = tokenizer.views(texts)
    truncated = views.per_text(views.truncated) > 0
    reasons = _bad_texts(views, truncated, long_text)
    good = np.flatnonzero((reasons == "") & ~taken[left])
    place = np.full(len(every), -1, dtype=np.int64)
    place[left[good]] = np.arange(len(good))
    tokens, cut = np.zeros(len(every), np.int64), np.zeros(len(every), np.bool_)
    tokens[left], cut[left] = views.per_text(views.lengths), truncated
    whys: Labels = np.full(len(every), "", dtype=object)
    whys[left] = reasons
    excerpts = pc.utf8_slice_codeunits(coded.dictionary, 0, EXCERPT_CHARACTERS)
    per_text = {
        "text_hash": pa.array(hashes, pa.binary(16)),
        "tokens": pa.array(tokens, pa.uint32()),
        "truncated": pa.array(cut),
        "excerpt": excerpts.cast(pa.string()),
        "unique": pa.array(place, pa.uint32(), mask=place < 0) if len(place) else None,
        "empty": pa.array(whys, pa.string(), mask=whys == "") if len(place) else None,
    }
    if reused is not None:
        per_text[TAKEN] = pa.array(old, pa.uint32(), mask=old < 0)
    return _with_columns(rows, coded.indices, per_text), views.take(good)


def _unclear(rows: pa.Table, old: Ints, reused: pa.Table | None) -> Flags:
    """Tell which old texts must be tokenized to know whether they are cut.

    An old line says so of a passage, or of what stood before it there.
    """
    if reused is None or CHARS[0] not in rows.column_names:
        return np.zeros(len(old), np.bool_)
    cut: Flags = np.append(reused["truncated"].to_numpy(), False)
    return cut[old]


def _bad_texts(views: TokenViews, truncated: Flags, long_text: str) -> Labels:
    empty = views.per_text(views.span[:, 0] >= views.span[:, 1]) > 0
    reasons: Labels = np.full(len(truncated), "", dtype=object)
    reasons[empty] = "empty_span"
    if long_text == "bad":
        reasons[truncated & ~empty] = "too_long"
    return reasons


def _with_columns(rows: pa.Table, indices: pa.Array, per_text: dict[str, Any]) -> pa.Table:
    hashes = per_text["text_hash"].take(indices).fill_null(text_hash(""))
    read_reason = rows["reason"].combine_chunks()
    unread = per_text["empty"]
    reason = read_reason if unread is None else pc.coalesce(read_reason, unread.take(indices))
    unique = per_text["unique"]
    places = pa.nulls(rows.num_rows, pa.uint32()) if unique is None else unique.take(indices)
    made = (
        rows.drop_columns(["text", "reason"])
        .append_column("text_hash", hashes)
        .append_column("tokens", per_text["tokens"].take(indices).fill_null(0))
        .append_column("truncated", per_text["truncated"].take(indices).fill_null(False))
        .append_column("excerpt", per_text["excerpt"].take(indices))
        .append_column("reason", reason)
        .append_column("detail", pa.nulls(rows.num_rows, pa.string()))
        .append_column("unique", places)
    )
    if TAKEN in per_text:
        made = made.append_column(TAKEN, per_text[TAKEN].take(indices))
    return made


@lru_cache(maxsize=1)
def _tokenizer(engine: Engine) -> TokenizesTexts:
    return engine.load_tokenizer()


@lru_cache(maxsize=1)
def _check(files: PlannedFiles) -> None:
    """Check once per process, after the tokenizer was loaded."""
    files.check_tokenizer()
