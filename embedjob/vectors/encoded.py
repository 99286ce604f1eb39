"""What ENCODE hands to WRITE: the finished embeddings of texts, and why some have none."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedjob.vectors.sparse import Sparse

Vectors = npt.NDArray[np.float32]
Failures = Mapping[int, tuple[str, str]]


@dataclass(frozen=True)
class Encoded:
    """Embeddings [R, D] in float32, NaN where `failed` gives a text's reason and detail.

    Beside them, where the recipe asks: sparse rows [R], empty where a text failed, and the
    routers' scores [R, E].
    """

    embeddings: Vectors
    failed: Failures
    stats: Mapping[str, float] = field(default_factory=dict)
    sparse: Sparse | None = None
    routers: Vectors | None = None
