"""A fit of a job as planned, and the artefact that the records of its output name for it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.job import Input
from embedjob.config.recipe import Recipe
from embedjob.errors import OutputError
from embedjob.output.fits.artefacts import ArtefactHead, read_head
from embedjob.output.fits.records import Record


@dataclass(frozen=True)
class PlannedFit:
    """A fit of a job: its section, the base recipe, and the artefact that it has made.

    `width` is the width of its vectors. `base` is None, and what follows from it, where an earlier
    fit has made none yet. `key` names the fit in the output's records, of which `number` is the
    last; `vectors` is the folder below `fits/` for vectors that are embedded for it.
    """

    section: Any
    width: int
    base: Recipe | None = None
    fingerprint: str = ""
    key: str = ""
    vectors: str = ""
    number: int = 0
    made: ArtefactHead | None = None

    @property
    def name(self) -> str:
        """The name of the fit in its job."""
        return str(self.section.name)

    @property
    def is_step(self) -> bool:
        """Whether a finishing step applies it, so that it is part of the fingerprint."""
        return FITS[self.section.kind].is_step

    @property
    def is_first(self) -> bool:
        """Whether it is to be made before the first vector is written."""
        return self.is_step or FITS[self.section.kind].before

    def as_dict(self) -> dict[str, Any]:
        """Return the fit and its artefact as plain JSON values."""
        artefact = None if self.made is None else asdict(self.made)
        return {"name": self.name, "kind": self.section.kind, "artefact": artefact}


def recorded_fit(out: str, fit: PlannedFit, record: Record, *, refit: bool) -> PlannedFit:
    """Return the fit with the artefact that a record names.

    OutputError where it is damaged, or of another encoder; with `refit` it counts as none then.
    """
    fit = replace(fit, number=record.number)
    try:
        return replace(fit, made=_head(out, fit, record))
    except OutputError:
        if not refit:
            raise
        return fit


def corpus_of(job_input: Input, paths: Sequence[str]) -> list[Any]:
    """Return what identifies a corpus: its paths, text columns and filter, but no shard."""
    separator = None if isinstance(job_input.text, str) else job_input.separator
    return [list(paths), job_input.text, separator, job_input.filter]


def _head(out: str, fit: PlannedFit, record: Record) -> ArtefactHead:
    head = read_head(out, record.kind, record.artefact)
    if (head.kind, head.encoder, head.width) != (fit.section.kind, fit.fingerprint, fit.width):
        raise OutputError(
            f"fit: {fit.name}: {head.name} is a {head.kind} of vectors of width {head.width} with"
            f" fingerprint {head.encoder[:12]}, needed is a {fit.section.kind} of width"
            f" {fit.width} and {fit.fingerprint[:12]}; was artefacts/ edited? --refit makes another"
        )
    return head
