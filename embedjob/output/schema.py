"""Schemas: the columns of every written file, equal in all of them."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedjob.config.heads import WeightedSum
from embedjob.config.job import Input, Output
from embedjob.config.recipe import Recipe
from embedjob.input.columns import columns_of
from embedjob.output.calibration import Calibration

FORMAT_VERSION = 1

TEXT_HASH = pa.binary(16)
_DTYPES: Mapping[str, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "uint8": pa.uint8(),
    "binary": pa.int8(),
    "ubinary": pa.uint8(),
}
# Eight dimensions to a number, the last number padded.
_PACKED = frozenset({"binary", "ubinary"})

ROW = pa.field("row", pa.uint32(), nullable=False)
PART = pa.field("part", pa.uint32(), nullable=False)
# The characters of a part, in the text as read.
CHARS = ("char_start", "char_stop")
SHARD = pa.field("shard", pa.string(), nullable=False)
# The columns whose lists `output.vector_list` is about.
VECTOR_COLUMNS = ("embedding", "router")
# Beside `embedding` on the way to a file: vectors of other files, in the type that files have.
STORED = "stored"


Quantize = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.generic]]


@dataclass(frozen=True)
class OutputSpec:
    """The properties that all files of one run share.

    `data` has vectors as lists of a fixed size, `stored` as `vector_list` says. `width` is that of
    vectors before `quantize`; `vocabulary`, if any, bounds sparse indices.
    With `passages` the lines of a row are good or bad one by one.
    """

    data: pa.Schema
    quarantine: pa.Schema
    fingerprint: str
    similarity: str
    weighted_sum: WeightedSum | None
    normalized: bool
    on_bad_row: str
    compression: str
    versions: tuple[tuple[str, str], ...] = ()
    vocabulary: int | None = None
    width: int = 0
    quantize: Quantize | None = None
    calibration: Calibration | None = None
    vector_list: Literal["fixed", "variable"] = "fixed"
    passages: bool = False

    @property
    def stored(self) -> pa.Schema:
        """Return the columns as files have them."""
        if self.vector_list == "fixed":
            return self.data
        return pa.schema([_variable(field) for field in self.data])


def output_spec_of(
    job_input: Input,
    recipe: Recipe,
    *,
    types: Mapping[str, pa.DataType],
    width: int,
    fingerprint: str,
    output: Output,
) -> OutputSpec:
    """Return the spec of a run's files; `types` are the column types that the plan agreed on."""
    lines, passages = line_fields(recipe), recipe.long_text == "split"
    return OutputSpec(
        data=data_schema(
            job_input,
            types=types,
            width=width,
            vector_dtype=recipe.vector_dtype,
            lines=lines,
        ),
        quarantine=quarantine_schema(job_input, types=types, lines=lines if passages else ()),
        fingerprint=fingerprint,
        similarity=recipe.measure,
        weighted_sum=recipe.similarity if isinstance(recipe.similarity, WeightedSum) else None,
        normalized=recipe.normalized,
        on_bad_row=job_input.on_bad_row,
        compression=output.compression,
        width=width,
        vector_list=output.vector_list,
        passages=passages,
    )


def data_schema(
    job_input: Input,
    *,
    types: Mapping[str, pa.DataType],
    width: int,
    vector_dtype: str,
    lines: Sequence[pa.Field] = (),
) -> pa.Schema:
    """Return row, shard, id?, kept columns, embedding, text_hash, tokens, truncated, `lines`."""
    return pa.schema(
        [
            ROW,
            SHARD,
            *_id_field(job_input, types),
            *(pa.field(name, types[name]) for name in columns_of(job_input).keep),
            pa.field("embedding", embedding_type(width, vector_dtype)),
            pa.field("text_hash", TEXT_HASH, nullable=False),
            pa.field("tokens", pa.uint32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *lines,
        ]
    )


def line_fields(recipe: Recipe) -> list[pa.Field]:
    """Return part, and for parts of texts char_start and char_stop; none if a row is one line."""
    part = [PART] if recipe.multi_vector else []
    of_parts = recipe.long_text in ("late_chunk", "split")
    return part + [pa.field(name, pa.uint32()) for name in CHARS if of_parts]


def quarantine_schema(
    job_input: Input, *, types: Mapping[str, pa.DataType], lines: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Return row, shard, id?, reason, detail, excerpt, `lines`."""
    return pa.schema(
        [
            ROW,
            SHARD,
            *_id_field(job_input, types),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("detail", pa.string()),
            pa.field("excerpt", pa.string()),
            *lines,
        ]
    )


def embedding_type(width: int, vector_dtype: str) -> pa.DataType:
    """Return a fixed-size list for embeddings of this width before they are quantised.

    Its items are named as Parquet names them, so that a round trip is exact.
    """
    numbers = -(-width // 8) if vector_dtype in _PACKED else width
    return pa.list_(pa.field("element", _DTYPES[vector_dtype]), numbers)


def vectors_of(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """Return the vectors of a column, without its nulls, from lists of either kind [R, D].

    ValueError where they have different widths.
    """
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    whole = whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
    present = whole.drop_null()
    numbers: npt.NDArray[np.generic] = present.flatten().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(whole.type):
        return numbers.reshape(-1, whole.type.list_size)
    widths = np.unique(present.value_lengths().to_numpy())
    if len(widths) > 1:
        raise ValueError(f"vectors of {widths[0]} and of {widths[-1]} numbers in one column")
    return numbers.reshape(len(present), int(widths[0]) if len(widths) else 0)


def types_text(types: Mapping[str, pa.DataType]) -> str:
    """Return exact types, by column, as text for a JSON document."""
    return encoded_schema(pa.schema([*types.items()]))


def types_from(text: str) -> dict[str, pa.DataType]:
    """Return the types that `types_text` wrote; ValueError where the text was edited."""
    return {field.name: field.type for field in decoded_schema(text)}


def encoded_schema(schema: pa.Schema) -> str:
    """Return a schema, metadata and all, as text for a JSON document."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def decoded_schema(text: str) -> pa.Schema:
    """Return the schema that `encoded_schema` wrote; ValueError where the text was edited."""
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
        str(schema)  # names are decoded late, and may be no UTF-8
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"a schema cannot be decoded ({error})") from error
    return schema


def schema_text(schema: pa.Schema) -> dict[str, str]:
    """Return columns and their types, to be shown and compared as JSON."""
    return {field.name: str(field.type) for field in schema}


def _variable(field: pa.Field) -> pa.Field:
    if field.name not in VECTOR_COLUMNS or not pa.types.is_fixed_size_list(field.type):
        return field
    return field.with_type(pa.list_(field.type.value_field))


def _id_field(job_input: Input, types: Mapping[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field("id", types[job_input.id])] if job_input.id else []
