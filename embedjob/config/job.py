"""The job as frozen values: what is read, how it is encoded, where it goes, and on what."""

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from embedjob.config.fits.fit_kinds import Fits
from embedjob.config.fits.fit_rules import check_fits
from embedjob.config.generation import Generation
from embedjob.config.recipe import PARTIAL, Recipe
from embedjob.config.types import Fraction, Positive, Section, moment_of, seconds_of

OUTPUT_COLUMNS = frozenset(
    {
        "row",
        "shard",
        "id",
        "embedding",
        "text_hash",
        "tokens",
        "truncated",
        "part",
        "char_start",
        "char_stop",
        "sparse_indices",
        "sparse_values",
        "router",
    }
)


# Keys in whose values `${NAME}` is replaced.
PATHS = (
    "input.path",
    "input.table",
    "output.path",
    "output.reuse_from",
    "encoder.model",
    "encoder.base",
    "encoder.adapters",
    "generate.model",
)


class InputTable(Section):
    """A table of versions, whose own list of Parquet files is the input.

    `uri` is the table's folder, of Iceberg also the JSON file of its metadata, or with `catalog`
    its name there. `catalog` is a name that pyiceberg's own configuration has. `version` is one of
    Delta's numbers or times, of Iceberg a snapshot's id, a branch or a tag; null for the newest.
    """

    format: Literal["delta", "iceberg"]
    uri: str
    catalog: str | None = None
    version: int | str | None = None

    @model_validator(mode="after")
    def _has_a_catalog_of_its_kind(self) -> "InputTable":
        if self.catalog is not None and self.format != "iceberg":
            raise ValueError("catalog: is for iceberg alone; a delta table is named by its uri")
        return self


def table_name(table: Mapping[str, Any]) -> str | None:
    """Return how a table is named as the input of an output, without its version; None for none."""
    parts = [table.get("format"), "table", table.get("catalog"), table.get("uri")]
    return " ".join(str(part) for part in parts if part) if table.get("uri") else None


class Input(Section):
    """The shards that are read, the files of paths or of a table, and their columns."""

    path: str | tuple[str, ...] = ()
    table: InputTable | None = None
    text: str | tuple[str, ...]
    separator: str = "\n"
    id: str | None = None
    keep: tuple[str, ...] = ()
    filter: tuple[Any, ...] | None = None
    on_bad_row: Literal["quarantine", "fail", "null"] = "quarantine"

    @model_validator(mode="after")
    def _has_one_source(self) -> "Input":
        if (self.path == ()) == (self.table is None):
            raise ValueError("path: is required, or table in its place; give one of them")
        return self

    @property
    def source(self) -> str | tuple[str, ...]:
        """The paths, or the table's name, to be shown."""
        return self.path if self.table is None else table_name(self.table.model_dump()) or ""


class Sample(Section):
    """A seeded part of an input: chunks and rows whose keys, 64 bits, are not above these bounds.

    `input/samples.py` says what the keys are.
    """

    seed: int
    chunks: int
    rows: int


class ReadInput(Input):
    """The input with the columns that stand before its passages; no job file can ask for it."""

    headings: tuple[str, ...] = ()


class SampledInput(ReadInput):
    """The input of a fit, of which some rows are read; no job file can ask for it."""

    sample: Sample


def with_headings(job_input: Input, headings: tuple[str, ...]) -> Input:
    """Return the input with the columns that stand before its passages, if there are any."""
    if not headings:
        return job_input
    return ReadInput.model_construct(**{**dict(job_input), "headings": headings})


class ActorRange(Section):
    """The fewest and the most actors of the pool."""

    min: Positive = 1
    max: Positive

    @model_validator(mode="after")
    def _is_a_range(self) -> "ActorRange":
        if self.min > self.max:
            raise ValueError(f"min must not be above max; got {self.min} and {self.max}")
        return self


class Pool(Section):
    """The actors that host the encoder."""

    actors: Literal["auto"] | Positive | ActorRange = "auto"
    gpus_per_actor: Annotated[float, Field(ge=0)] = 1
    cpus_per_actor: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    tokens_per_microbatch: Literal["auto"] | Positive = "auto"

    @field_validator("gpus_per_actor")
    @classmethod
    def _is_a_share_or_whole(cls, value: float) -> float:
        return _share_or_whole(value)

    @property
    def cpus(self) -> float:
        """CPUs one actor asks Ray for: on CPU a half, or no read task would ever be scheduled."""
        if self.cpus_per_actor != "auto":
            return float(self.cpus_per_actor)
        return 1.0 if self.gpus_per_actor else 0.5


def _share_or_whole(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(
            f"got {gpus:g}, allowed is a share of one GPU (0 to 1) or a whole number of them"
        )
    return gpus


class GeneratorPool(Section):
    """The actors that host the generator, on CPUs and GPUs that no actor of `pool` uses.

    `sequences` are so many answers that are written together. `gpus_per_actor: auto` is that of
    `pool`.
    """

    actors: Literal["auto"] | Positive | ActorRange = "auto"
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    cpus_per_actor: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    sequences: Literal["auto"] | Positive = "auto"

    @field_validator("gpus_per_actor")
    @classmethod
    def _is_a_share_or_whole(cls, value: Literal["auto"] | float) -> Literal["auto"] | float:
        return value if value == "auto" else _share_or_whole(value)


class Generate(Generation):
    """The `generate` section: what a generator makes of each text, and on which actors.

    `method` is a method, or the path of its file, whose own `generate` section is taken where a key
    is left out; the encoder's method if it is null.
    """

    method: str | None = None
    pool: GeneratorPool = GeneratorPool()


class Output(Section):
    """Where the embedding shards go; vectors are also taken over from outputs in `reuse_from`."""

    path: str
    chunk_rows: Positive = 16384
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    vector_list: Literal["fixed", "variable"] = "fixed"
    reuse_from: tuple[str, ...] = ()


class Run(Section):
    """How long, how far, and how much may go wrong."""

    limit: Positive | None = None
    max_quarantined: Fraction = 0.01
    max_shrink: Fraction = 0.1
    until: str | None = None
    wait_for_resources: str = "30m"
    stall_seconds: Positive = 1800

    @field_validator("wait_for_resources")
    @classmethod
    def _is_a_duration(cls, value: str) -> str:
        seconds_of(value)
        return value

    @field_validator("until")
    @classmethod
    def _is_a_deadline(cls, value: str | None) -> str | None:
        if value is not None:
            moment_of(value, datetime.now(timezone.utc))
        return value

    @property
    def resource_wait_seconds(self) -> float:
        """`wait_for_resources` in seconds."""
        return seconds_of(self.wait_for_resources)


class Job(Section):
    """One job file, resolved."""

    input: Input
    encoder: Recipe
    generate: Generate | None = None
    fit: Fits = ()
    pool: Pool = Pool()
    output: Output
    run: Run = Run()

    @property
    def generator_pool(self) -> Pool:
        """The generator's actors, as the encoder's are described."""
        pool = GeneratorPool() if self.generate is None else self.generate.pool
        gpus = self.pool.gpus_per_actor if pool.gpus_per_actor == "auto" else pool.gpus_per_actor
        return Pool(
            actors=pool.actors, gpus_per_actor=float(gpus), cpus_per_actor=pool.cpus_per_actor
        )

    @model_validator(mode="after")
    def _columns_do_not_collide(self) -> "Job":
        taken = sorted(OUTPUT_COLUMNS.intersection(self.input.keep))
        if taken:
            raise ValueError(
                f"input.keep: {', '.join(taken)} would collide with the output's own columns"
                f" ({', '.join(sorted(OUTPUT_COLUMNS))}); rename them in the input"
            )
        return self

    @model_validator(mode="after")
    def _deadline_can_be_kept(self) -> "Job":
        if self.run.until is not None and self.generate and self.generate.engine == "vllm":
            raise ValueError(
                "run.until: got a deadline, but generate.engine: vllm makes the texts of all chunks"
                " before the first is embedded; leave run.until out, or set engine: transformers"
            )
        return self

    @model_validator(mode="after")
    def _fits_are_used(self, info: ValidationInfo) -> "Job":
        # A method may yet bring the steps, or the fits.
        if not (info.context or {}).get(PARTIAL):
            check_fits(self.fit, self.encoder)
        return self
