"""Encoded texts, from ENCODE to WRITE: finished embeddings, and why some texts have none."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from embedjob.errors import InputError
from embedjob.vectors.sparse import Sparse

Vectors = npt.NDArray[np.float32]
Failures = Mapping[int, tuple[str, str]]


@dataclass(frozen=True)
class Lines:
    """Several embeddings per text: of L, text r has those from offsets[r] to offsets[r + 1].

    `chars` [L, 2] is the character range in the text as read, where an embedding covers a part.
    """

    offsets: npt.NDArray[np.int64]
    chars: npt.NDArray[np.int64] | None = None

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of embeddings of each text [R]."""
        return np.diff(self.offsets)

    def require_single(self, why: str) -> None:
        """Raise InputError if a text has several embeddings; `why` says by what setting."""
        several = np.flatnonzero(self.counts > 1)
        if len(several):
            raise InputError(
                f"text number {several[0]} has {self.counts[several[0]]} parts under {why}, and an"
                " embedding of each; use encode_parts"
            )


@dataclass(frozen=True)
class Encoded:
    """Embeddings [R, D] in float32, NaN where `failed` gives a text's reason and detail.

    With `lines` there are several for each text [L, D]: all embeddings of a text or none. Where the
    recipe asks for them: sparse rows [R], empty where a text failed, and router scores [R, E].
    """

    embeddings: Vectors
    failed: Failures
    stats: Mapping[str, float] = field(default_factory=dict)
    sparse: Sparse | None = None
    routers: Vectors | None = None
    lines: Lines | None = None

    @property
    def line_offsets(self) -> npt.NDArray[np.int64]:
        """Return the first embedding of each text, and one past the last of all [R + 1]."""
        return np.arange(len(self.embeddings) + 1) if self.lines is None else self.lines.offsets

    def of_passages(self, lines: Lines) -> "Encoded":
        """Return the embeddings of texts whose passages these are, a text failing by its first."""
        owners = np.repeat(np.arange(len(lines.offsets) - 1), lines.counts)
        failed = {int(owners[one]): self.failed[one] for one in sorted(self.failed, reverse=True)}
        return replace(self, failed=failed, lines=lines)

    def require_all(self, texts: int) -> None:
        """Raise InputError if one of so many texts has no embedding."""
        if self.failed:
            text, (reason, detail) = next(iter(sorted(self.failed.items())))
            raise InputError(
                f"{len(self.failed)} of {texts} texts cannot be embedded; the first is number"
                f" {text}: {reason}, {detail}. Leave it out"
            )
