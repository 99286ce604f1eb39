"""int96 says of no value how fine it is: each is kept as it is, or its shard is named."""

import datetime
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.config.job import Input
from embedjob.errors import InputError
from embedjob.input.columns import Standing
from embedjob.input.footers import Footer, Wanted
from embedjob.input.int96 import exact_units, stored_unit
from embedjob.input.listing import find_files
from embedjob.input.reading import read_chunk
from embedjob.output.chunk_file import data_table, file_bytes
from embedjob.output.manifest import Footers, described, remembered
from tests.shards import WIDTH, finished, footers_of, output_spec, plan_of

FAR = datetime.datetime(9999, 12, 31, 23, 59, 59, 999_999)
NEAR = datetime.datetime(2024, 2, 29, 12, 0, 0, 123_456)
FINE = pandas.Timestamp(NEAR) + pandas.Timedelta(789)
SPARK = {"org.apache.spark.version": "3.5.1", "org.apache.spark.sql.parquet.row.metadata": "{}"}


def written(
    path: Path, moments: pa.Array, metadata: Mapping[str, str] | None = None, **properties: Any
) -> Path:
    """A shard as Hive and Impala write it: int96, and nothing that says which unit it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"t": [f"text {n}" for n in range(len(moments))], "at": moments})
    groups = properties.pop("row_group_size", None)
    how: dict[str, Any] = {"use_deprecated_int96_timestamps": True, "store_schema": False}
    with pq.ParquetWriter(path, table.schema, **how, **properties) as writer:
        writer.write_table(table, row_group_size=groups)
        writer.add_key_value_metadata(metadata or {})
    return path


def units(path: Path, names: tuple[str, ...] = ("at",)) -> list[str]:
    metadata = pq.read_metadata(path)
    with path.open("rb") as source:
        return exact_units(source, metadata, range(metadata.num_row_groups), names)


def kept(path: Path, **standing: pa.DataType) -> dict[str, list[Any]]:
    """What a run would write of the column, by shard."""
    job_input = Input(path=str(path), text="t", keep=("at",))
    plan = plan_of(job_input, standing=Standing(standing))
    assert not plan.faults
    spec = output_spec(job_input, plan.types)
    found: dict[str, list[Any]] = {}
    for chunk in plan.chunks:
        rows = finished(read_chunk(chunk, job_input))
        vectors = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
        data = file_bytes(
            data_table(rows, vectors, chunk.shard, spec=spec), chunk.shard, spec=spec, counts={}
        )
        column = pq.read_table(io.BytesIO(data))["at"]
        assert column.type == plan.types["at"]
        found.setdefault(Path(chunk.shard.url).name, []).extend(column.to_pylist())
    return found


US, NS = pa.timestamp("us"), pa.timestamp("ns")
ENDS = [2**63 - 1, 2**63 - 809, -(2**63) + 1, -(2**63) + 192]


@pytest.mark.parametrize(
    ("moments", "exact"),
    [
        (pa.array([NEAR, None], US), ["us", "ns"]),
        (pa.array([None, None], US), ["us", "ns"]),
        (pa.array([], US), ["us", "ns"]),
        (pa.array([FAR, NEAR], US), ["us"]),
        (pa.array([datetime.datetime(1, 1, 1)], US), ["us"]),
        (pa.array([datetime.datetime(1677, 1, 1)], US), ["us"]),
        (pa.array([datetime.datetime(2263, 1, 1)], US), ["us"]),
        (pa.array([FINE], NS), ["ns"]),
        (pa.array([-1], NS), ["ns"]),
        *((pa.array([end], NS), ["ns"]) for end in ENDS),
        (pa.array([-(2**63) // 1000 * 1000 + 1000], NS), ["us", "ns"]),
        (pa.array([[FINE], None, []], pa.list_(NS)), ["ns"]),
        (pa.array([[FAR], None], pa.list_(US)), ["us"]),
        (pa.array([{"x": FINE, "y": NEAR}], pa.struct({"x": NS, "y": US})), ["ns"]),
        (pa.array([[(FINE, [NEAR])], None], pa.map_(NS, pa.list_(US))), ["ns"]),
    ],
)
def test_the_units_in_which_all_moments_are_exact(
    moments: pa.Array, exact: list[str], tmp_path: Path
) -> None:
    assert units(written(tmp_path / "a.parquet", moments, row_group_size=1)) == exact


def test_what_the_file_says(tmp_path: Path) -> None:
    """Arrow's own schema, and Spark's mark; a column that nobody needs says nothing."""
    fine = pa.array([FINE], NS)
    for number, (metadata, properties, said) in enumerate(
        [
            (None, {}, None),
            (SPARK, {}, "us"),
            ({"writer.model.name": "hive"}, {}, None),
        ]
    ):
        path = written(tmp_path / f"{number}.parquet", fine, metadata, **properties)
        footer = pq.read_metadata(path)
        assert (stored_unit(footer, ("at",)), stored_unit(footer, ("t",))) == (said, "us")
    path = tmp_path / "arrow.parquet"
    pq.write_table(pa.table({"at": fine}), path, use_deprecated_int96_timestamps=True)
    assert stored_unit(pq.read_metadata(path), ("at",)) == "ns"


def test_digits_below_microseconds_are_kept(tmp_path: Path) -> None:
    written(tmp_path / "a.parquet", pa.array([FINE, None, pandas.Timestamp(NEAR)], NS))
    assert kept(tmp_path) == {"a.parquet": [FINE, None, NEAR]}


@pytest.mark.parametrize("kind", ["list", "struct", "map"])
def test_digits_inside_of_columns_are_kept(kind: str, tmp_path: Path) -> None:
    columns = {
        "list": pa.array([[FINE], []], pa.list_(NS)),
        "struct": pa.array([{"x": FINE}, None], pa.struct({"x": NS})),
        "map": pa.array([[("k", FINE)], None], pa.map_(pa.string(), NS)),
    }
    written(tmp_path / "a.parquet", columns[kind])
    assert kept(tmp_path) == {"a.parquet": columns[kind].to_pylist()}


def test_shards_agree_where_all_their_moments_fit(tmp_path: Path) -> None:
    """By chance no moment of a shard is finer than microseconds, or it has none."""
    shards = {"a": [FINE], "b": [pandas.Timestamp(NEAR)] * 2, "c": [None] * 3}
    for name, moments in shards.items():
        written(tmp_path / f"{name}.parquet", pa.array(moments, NS))
    assert kept(tmp_path) == {f"{name}.parquet": moments for name, moments in shards.items()}
    written(tmp_path / "a.parquet", pa.array([FAR], US))
    shards["a"] = [FAR]  # type: ignore[list-item]
    assert kept(tmp_path) == {f"{name}.parquet": moments for name, moments in shards.items()}


def test_row_groups_of_one_shard_agree(tmp_path: Path) -> None:
    """A chunk is read in a unit of its own, and written in that of the corpus."""
    moments = [FINE, *[pandas.Timestamp(NEAR)] * 20, FINE]
    written(tmp_path / "a.parquet", pa.array(moments, NS), row_group_size=5)
    assert kept(tmp_path) == {"a.parquet": moments}
    written(tmp_path / "a.parquet", pa.array(moments, NS))
    assert kept(tmp_path) == {"a.parquet": moments}


def test_no_type_holds_both_and_the_shard_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    both = pa.array([{"x": FINE, "y": FAR}], pa.struct({"x": NS, "y": US}))
    path = written(tmp_path / "bad.parquet", both)
    written(tmp_path / "good.parquet", pa.array([{"x": NEAR, "y": NEAR}], both.type))
    job_input = Input(path=str(tmp_path), text="t", keep=("at",))
    ((url, reason),) = plan_of(job_input).faults
    assert url == str(path)
    assert reason.startswith("whole, but it has int96 timestamps in at.x, at.y that no type")
    assert plan_of(Input(path=str(tmp_path), text="t")).faults == ()  # if nobody needs them


def test_shards_that_do_not_agree_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / f"{name}.parquet", pa.array([FINE], NS))
    written(tmp_path / "c.parquet", pa.array([FAR], US))
    job_input = Input(path=str(tmp_path), text="t", keep=("at",))
    plan = plan_of(job_input)
    assert plan.types == {"at": NS}
    assert [Path(url).name for url, _ in plan.faults] == ["c.parquet"]


def test_what_is_done_stays_as_it_is(tmp_path: Path) -> None:
    """Microseconds were written; a shard that is finer is named, and no digit of it is lost."""
    first = written(tmp_path / "a.parquet", pa.array([NEAR], US))
    assert kept(tmp_path, at=NS) == {"a.parquet": [NEAR]}
    assert kept(tmp_path, at=US) == {"a.parquet": [NEAR]}
    written(first, pa.array([FINE], NS))
    job_input = Input(path=str(tmp_path), text="t", keep=("at",))
    with pytest.raises(InputError, match=r"timestamp\[ns\], and timestamp\[us\] in the files of"):
        plan_of(job_input, standing=Standing({"at": US}))
    written(first, pa.array([FAR], US))
    with pytest.raises(InputError, match=r"timestamp\[us\], and timestamp\[ns\] in the files of"):
        plan_of(job_input, standing=Standing({"at": NS}))


def test_damaged_pages_are_named_at_planning(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.parquet",
        pa.array([FINE] * 50, NS),
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    column = pq.read_metadata(path).row_group(0).column(1)
    whole = bytearray(path.read_bytes())
    whole[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(whole)
    job_input = Input(path=str(path), text="t", keep=("at",))
    footer = footers_of(find_files(str(path)).shards, job_input)[str(path)]
    assert "its timestamps cannot be read" in str(footer)


def test_the_choice_is_remembered_with_the_footer(tmp_path: Path) -> None:
    """An unchanged shard is looked at once."""
    job_input = Input(path=str(tmp_path), text="t", keep=("at",))
    for name, moments in {"a": [FINE], "b": [NEAR], "c": [FAR]}.items():
        written(tmp_path / f"{name}.parquet", pa.array(moments, NS if name == "a" else US))
    shards = find_files(job_input.path).shards
    footers = footers_of(shards, job_input)
    found = [footers[shard.url] for shard in shards]
    assert [isinstance(one, Footer) and one.fine_schema is not None for one in found] == [
        False,
        True,
        False,
    ]
    layouts: dict[Any, int] = {}
    rows = [
        {"url": shard.url, "etag": shard.etag, **described(footers[shard.url], layouts)}
        for shard in shards
    ]
    wanted = Wanted(("t",), ("t", "at"))
    kept_footers = Footers.from_dict(Footers.of(wanted, layouts).as_dict())
    again = remembered(rows, kept_footers, wanted)
    assert [again[shard.url, shard.etag] for shard in shards] == found
    # An output of a release that looked at no value.
    before = kept_footers.as_dict()
    del before["fine_schemas"]
    assert remembered(rows, Footers.from_dict(before), wanted) == {}
