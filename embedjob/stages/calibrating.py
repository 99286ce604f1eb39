"""Calibration: read and embed a sample of the corpus once, for the ranges of int8 and uint8."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa

from embedjob.errors import FaultError, OutputError
from embedjob.input.chunks import Chunk
from embedjob.input.reading import HEADING
from embedjob.output.calibration import (
    ENOUGH_VECTORS,
    SAMPLE_ROWS,
    Calibration,
    beginning,
    rows_each,
)
from embedjob.output.claim import read_claims
from embedjob.output.schema import OutputSpec
from embedjob.stages.engine import EncodesViews, Engine
from embedjob.stages.tokenize import tokenize_rows
from embedjob.vectors.quantizing import CALIBRATED, quantize, ranges_of

_FEWEST_VECTORS = 2
_READ = ("text", HEADING, "reason")
_CAST = frozenset({"float32", "float16"})


@dataclass(frozen=True)
class FindRanges:
    """Finds the ranges of an output that has none yet; a row that fails is left out."""

    chunks: tuple[Chunk, ...]
    rows_of: Callable[[Chunk], pa.Table]

    def __call__(self, encoder: EncodesViews, engine: Engine) -> Calibration:
        """Return the sample's calibration; OutputError if fewer than two rows have vectors."""
        sample = self._sample()
        vectors = np.empty((0, 0), np.float32)
        if len(sample):
            _, views = tokenize_rows(sample, engine.load_tokenizer(), engine.long_text)
            encoded = encoder.encode_views(views, stop=lambda: False, on_progress=lambda *_: None)
            vectors = encoded.embeddings[np.isfinite(encoded.embeddings).all(axis=1)]
        if len(vectors) < _FEWEST_VECTORS:
            raise OutputError(
                "encoder.vector_dtype: int8 and uint8 take the ranges of their dimensions from a"
                f" sample of the input, but {len(sample)} rows of {len(self.chunks)} sampled"
                f" chunks gave {len(vectors)} vectors, and at least {_FEWEST_VECTORS} are needed;"
                " set vector_dtype: float32, float16, binary or ubinary"
            )
        return Calibration.of(ranges_of(vectors), vectors=len(vectors))

    def _sample(self) -> pa.Table:
        """Return text, heading if there is any, and reason of at most SAMPLE_ROWS readable rows."""
        each = rows_each(self.chunks)
        parts = [beginning(chunk, rows=each) for chunk in self.chunks]
        sample = pa.concat_tables(self._spread(parts, each), promote_options="default")
        if len(sample) < ENOUGH_VECTORS and parts != list(self.chunks):
            # The filter passes few rows: read the same chunks to their ends.
            sample = pa.concat_tables(self._spread(self.chunks, each), promote_options="default")
        return sample.slice(0, SAMPLE_ROWS)

    def _spread(self, parts: Sequence[Chunk], each: int) -> Iterator[pa.Table]:
        """Yield good rows of each part, evenly spaced; none of a part that cannot be read."""
        yield pa.table(
            {"text": pa.array([], pa.large_string()), "reason": pa.nulls(0, pa.string())}
        )
        for part in parts:
            try:
                rows = self.rows_of(part)
            except (FaultError, OSError):
                continue
            good = rows.select([one for one in _READ if one in rows.column_names])
            good = good.filter(rows["reason"].is_null())
            places = np.linspace(0, len(good) - 1, min(each, len(good))).astype(np.int64)
            yield good.take(places)


def with_quantization(spec: OutputSpec, out: str, *, vector_dtype: str) -> OutputSpec:
    """Return the spec that quantises by the ranges in the output's claim, if the dtype needs it."""
    if vector_dtype in _CAST:
        return spec
    calibration = _calibration(out, spec.fingerprint) if vector_dtype in CALIBRATED else None
    ranges = None if calibration is None else calibration.array
    quantizer = partial(quantize, dtype=vector_dtype, ranges_2D=ranges)
    return replace(spec, quantize=quantizer, calibration=calibration)


@lru_cache(maxsize=4)
def _calibration(out: str, fingerprint: str) -> Calibration:
    """Return the calibration of the claim under which files are written; claims never change.

    OutputError where the claim has none; a run that checked its encoder has put it there.
    """
    for claim in read_claims(out):
        if claim.fingerprint == fingerprint and claim.calibration is not None:
            return claim.calibration
    raise OutputError(
        f"{out}: no claim of fingerprint {fingerprint[:12]} has the ranges of its vectors; was"
        " _embedjob.json edited or deleted during the run?"
    )
