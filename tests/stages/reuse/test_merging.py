"""A chunk that takes over some of its texts' lines, beside the same chunk without any."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job import Input
from embedjob.config.recipe import Recipe, Split
from embedjob.output.committing import commit, count_rows
from embedjob.output.head_columns import with_head_columns
from embedjob.output.schema import OutputSpec
from embedjob.stages.chunk_state import ChunkState, from_block, to_block
from embedjob.stages.reuse.merging import NO_REUSE, Reuse, lines_of_texts, merged
from embedjob.stages.tokenize import tokenize_rows
from embedjob.stages.write import assemble_rows
from embedjob.text.conversations import text_hash
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.vectors.quantizing import quantize
from tests.fakes import tiny_tokenizer
from tests.shards import FINGERPRINT, output_spec
from tests.stages.reuse.chunk_rows import CHUNK, KINDS, PLAIN, ROWS, encoded, rows

INPUT = Input(path="in", text="t")
TEXTS = st.lists(
    st.none() | st.sampled_from(["a fox", "", "the river bank", "a b c", "fox " * 40, "日本語"]),
    min_size=1,
    max_size=ROWS,
)


def spec_of(kind: str, **recipe: Any) -> OutputSpec:
    lines = {"long_text": "late_chunk", "templates": ("{text}",)} if kind == "lines" else {}
    spec = output_spec(INPUT, {}, **recipe, **lines)
    if kind == "lines":
        # `keep` and parts together have both kinds of columns.
        assert {"part", "char_start"} <= {*spec.data.names}
    return with_head_columns(spec, vocabulary=600, routers=2) if kind == "heads" else spec


def file_of(state: ChunkState, spec: OutputSpec, out: str) -> pa.Table:
    """The chunk as its file has it."""
    table = assemble_rows(state)
    done = commit(out, state.chunk, table, rows_in=int(state.stats["rows"]), spec=spec)
    return pq.read_table(f"{out}/data/{FINGERPRINT[:12]}/{done.name}")


def state_of(texts: list[str | None], kind: str, reused: pa.Table | None = None) -> ChunkState:
    made, views = tokenize_rows(rows(texts), PLAIN, "truncate", reused)
    state = ChunkState(
        CHUNK, made, encoded=encoded(views, kind), stats={"rows": len(texts)}, reused=reused
    )
    # As it travels.
    [arrived] = from_block(to_block([state]))
    return arrived


def old_lines(file: pa.Table, hashes: list[bytes]) -> pa.Table:
    """The lines of these texts, each text's first row alone, in the order of the hashes."""
    parts = []
    for one in hashes:
        own = [n for n, row in enumerate(file.to_pylist()) if row["text_hash"] == one]
        first = [n for n in own if file["row"][n] == file["row"][own[0]]]
        parts.append(file.take(first))
    table = pa.concat_tables([file.slice(0, 0), *parts])
    return table.drop_columns([name for name in ("row", "shard") if name in table.column_names])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "ubinary"])
@settings(max_examples=25)
@given(texts=TEXTS, data=st.data())
def test_its_file_is_the_same_as_without_whatever_it_takes_over(
    kind: str,
    dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    data: Any,
) -> None:
    spec = spec_of(kind, vector_dtype=dtype)
    if dtype == "ubinary":
        spec = replace(
            spec, quantize=lambda vectors: quantize(vectors, dtype=dtype, ranges_2D=None)
        )
    folder = tmp_path_factory.mktemp("out")
    whole = file_of(state_of(texts, kind), spec, str(folder / "whole"))
    distinct = sorted({*whole["text_hash"].to_pylist()})
    taken = data.draw(st.lists(st.sampled_from(distinct), unique=True)) if distinct else []
    reused = old_lines(whole, taken)
    state = state_of(texts, kind, reused)
    assert file_of(state, spec, str(folder / "some")).equals(whole)

    counts = count_rows(assemble_rows(state), spec=spec)
    own = [text for text in texts if text is not None and text_hash(text) in taken]
    assert counts["reused"] == len(own)
    assert counts["embedded"] == len(distinct) - len(taken)
    assert counts["rows"] == sum(
        counts[name] for name in ("embedded", "reused", "deduplicated", "nulls", "quarantined")
    )


@given(TEXTS)
def test_texts_with_old_lines_are_not_tokenized(texts: list[str | None]) -> None:
    file = pa.table({"text_hash": pa.array([text_hash("a fox"), text_hash("")], pa.binary(16))})
    made, views = tokenize_rows(rows(texts), PLAIN, "truncate", file)
    left = [text for text in dict.fromkeys(texts) if text not in (None, "a fox", "")]
    assert views.texts == len(left)
    expected = {"a fox": 0, "": 1}
    assert made["taken"].to_pylist() == [
        expected.get(text or "-") if text else (1 if text == "" else None) for text in texts
    ]
    assert all(
        (unique is None) == (text in (None, "a fox", ""))
        for text, unique in zip(texts, made["unique"].to_pylist(), strict=True)
    )


def test_the_first_of_a_texts_lines_is_found() -> None:
    hashes = [text_hash(name) for name in "aabbbc"]
    lines = pa.table({"text_hash": pa.array(hashes, pa.binary(16))})
    asked = [text_hash(name) for name in "cbza"]
    assert lines_of_texts(asked, lines).tolist() == [5, 2, -1, 0]
    assert lines_of_texts(asked, None).tolist() == [-1] * 4
    assert lines_of_texts([], lines).tolist() == []


def test_a_chunk_without_old_lines_goes_on_as_it_is() -> None:
    state = ChunkState(CHUNK, rows(["a fox"]))
    assert NO_REUSE.attached(state) is state
    assert Reuse({"another": (0, ())}).of([CHUNK]) == NO_REUSE


SPLITTER = ViewTokenizer(
    tiny_tokenizer("llama"),
    Recipe(model="m", max_tokens=64, long_text="split", split=Split(max_tokens=24)),
)
FOX, DOG = "The quick brown fox jumps over. ", "The lazy dog is near the river bank. "
DOCUMENTS = st.none() | st.lists(st.sampled_from([FOX, DOG, "Short.\n\n", ""]), max_size=5).map(
    "".join
)
LONG = "a b c d " * 30


def cut_heading() -> str:
    """What is left of the long heading, which is not cut where it is a heading by itself."""
    assert SPLITTER.splitter is not None
    return SPLITTER.splitter([FOX], [LONG]).texts[0].split("\n")[0]


HEADINGS = st.sampled_from([None, "A fox", LONG, LONG * 2, cut_heading()])


def split_state(
    documents: list[tuple[str | None, str | None]], reused: pa.Table | None = None
) -> ChunkState:
    """Documents with what stands before their passages, as they come to WRITE."""
    texts, headings = zip(*documents, strict=True)
    table = rows([*texts]).append_column("heading", pa.array(headings, pa.large_string()))
    made, views = tokenize_rows(table, SPLITTER, "split", reused)
    stats = {"rows": len(documents)}
    return ChunkState(CHUNK, made, encoded=encoded(views, "plain"), stats=stats, reused=reused)


@settings(max_examples=40)
@given(
    documents=st.lists(st.tuples(DOCUMENTS, HEADINGS), min_size=1, max_size=ROWS), data=st.data()
)
def test_a_file_of_passages_is_the_same_whatever_it_takes_over(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[str | None, str | None]],
    data: Any,
) -> None:
    """Lines of other rows, parts and headings: the place and the cut are those of the new row."""
    spec = output_spec(INPUT, {}, max_tokens=64, long_text="split", split={"max_tokens": 24})
    folder = tmp_path_factory.mktemp("out")
    whole = file_of(split_state(documents), spec, str(folder / "whole"))
    # By lines: of two passages with one hash, the heading may be cut in one alone.
    wanted = data.draw(st.sets(st.sampled_from(range(len(whole))))) if len(whole) else set()
    firsts = {hash_: line for line, hash_ in enumerate(whole["text_hash"].to_pylist())}
    firsts |= {whole["text_hash"][line].as_py(): line for line in wanted}
    lines = sorted({firsts[whole["text_hash"][line].as_py()] for line in wanted})
    places = ("row", "shard", "part", "char_start", "char_stop")
    reused = whole.take(pa.array(lines, pa.int64())).drop_columns(
        [name for name in places if name in whole.column_names]
    )
    state = split_state(documents, reused)
    assert file_of(state, spec, str(folder / "some")).equals(whole)

    counts = count_rows(assemble_rows(state), spec=spec)
    taken = {*reused["text_hash"].to_pylist()}
    hashes: dict[int, set[bytes]] = {}
    for row, hash_ in zip(whole["row"].to_pylist(), whole["text_hash"].to_pylist(), strict=True):
        hashes.setdefault(row, set()).add(hash_)
    seen: set[bytes] = set()
    expected = {"embedded": 0, "reused": 0}
    for own in hashes.values():
        if own - taken - seen:
            expected["embedded"] += 1
        elif own & taken:
            expected["reused"] += 1
        seen |= own
    assert {name: counts[name] for name in expected} == expected
    assert state.encoded is not None
    assert len(state.encoded.embeddings) == len({*whole["text_hash"].to_pylist()} - taken)
    assert counts["rows"] == sum(
        counts[name] for name in ("embedded", "reused", "deduplicated", "nulls", "quarantined")
    )


def test_rows_stand_in_order_with_all_their_lines() -> None:
    made = pa.table(
        {
            "row": pa.array([1, 1, 4], pa.uint32()),
            "part": pa.array([0, 1, 0], pa.uint32()),
            "tokens": pa.array([5, 5, 6], pa.uint32()),
        }
    )
    reused = pa.table(
        {
            "text_hash": pa.array([text_hash(name) for name in "xxy"], pa.binary(16)),
            "embedding": pa.array([[1.0], [2.0], [3.0]], pa.list_(pa.float32(), 1)),
            "tokens": pa.array([7, 7, 8], pa.uint32()),
            "part": pa.array([0, 1, 0], pa.uint32()),
        }
    )
    taken = pa.table(
        {
            "row": pa.array([0, 2, 3], pa.uint32()),
            "taken": pa.array([2, 0, 0], pa.uint32()),
            "tokens": pa.array([0, 0, 0], pa.uint32()),
        }
    )
    table = merged(made, taken, reused)
    assert table["row"].to_pylist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert table["part"].to_pylist() == [0, 0, 1, 0, 1, 0, 1, 0]
    assert table["tokens"].to_pylist() == [8, 5, 5, 7, 7, 7, 7, 6]
    assert table["stored"].to_pylist() == [[3.0], None, None, [1.0], [2.0], [1.0], [2.0], None]
