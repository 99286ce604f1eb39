"""The fits of a job as planned: the artefacts that they have made, and vectors for the others.

A finishing step names a fit in the job, and its artefact in a recipe that is settled. A fit is
computed from the base recipe: the job's own, cut before the step, in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.fits.fit_rules import views_once_fitted
from embedjob.config.job import Job, Sample
from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError, FitError, OutputError
from embedjob.input.samples import Rows, SamplePlace, all_rows, sample_of
from embedjob.job.planned_fits import PlannedFit, corpus_of, recorded_fit
from embedjob.job.resolve import IdentifiedJob
from embedjob.job.text_fits import with_text_fits
from embedjob.output.claim import read_claims
from embedjob.output.file_names import digest
from embedjob.output.fingerprint import canonical, fingerprint
from embedjob.output.fits.artefacts import ArtefactHead
from embedjob.output.fits.records import read_records
from embedjob.output.manifest import SnapshotFile
from embedjob.output.snapshot import Snapshot, newest_snapshot
from embedjob.storage.objects import Stored, absolute, join, open_unchanged
from embedjob.vectors.finishing import width


@dataclass(frozen=True)
class VectorSource:
    """The vectors of a fit: a snapshot, and the finishing steps that its vectors still need.

    `others` is the output whose vectors are read beside them; `embedded` says that they were
    embedded for the fit alone.
    """

    out: str
    snapshot: Snapshot
    steps: tuple[Any, ...] = ()
    sample: Sample | None = None
    embedded: bool = False
    others: "VectorSource | None" = None


def settled(
    job: IdentifiedJob, *, refit: bool = False
) -> tuple[IdentifiedJob, tuple[PlannedFit, ...]]:
    """Return the job with artefacts in place of the names of fits that have made one; and its fits.

    As long as a fit has made none, the fingerprint is no output's. With `refit`, an artefact that
    is damaged counts as none: it is to be made again.

    Raises:
        ConfigError: a role names a fit that is not there.
        OutputError: an artefact is damaged, or belongs to another encoder.
    """
    if not job.config.fit:
        return job, ()
    _require_named(job)
    records, made = read_records(job.out), dict[str, ArtefactHead]()
    job, fits = with_text_fits(job, records, made, refit=refit)
    lacking = any(fit.made is None for fit in fits)
    for section in _in_order(job.config):
        fit = _planned(job, section, made)
        if lacking:
            fit = PlannedFit(section, width=fit.width)
        if fit.base is not None and (record := records.get(fit.key)):
            fit = recorded_fit(job.out, fit, record, refit=refit)
        if fit.made is not None:
            made[fit.name] = fit.made
        fits.append(fit)
    return _with_artefacts(job, made), tuple(fits)


def served_vectors(out: str, fit: PlannedFit, job: IdentifiedJob) -> VectorSource | None:
    """Return the vectors of a fit from the newest snapshot of an output; None if it lacks them.

    They do where its recipe is the base recipe, or ends in fewer of the same finishing steps.
    """
    snapshot = newest_snapshot(out)
    assert fit.base is not None
    for kept in range(len(fit.base.finish), -1, -1):
        recipe = fit.base.model_copy(update={"finish": fit.base.finish[:kept]})
        if snapshot is not None and fingerprint(recipe, job.digests) == snapshot.fingerprint:
            files = {SamplePlace(one.shard, one.start, one.stop): one for one in snapshot.files}
            # Without a filter the rows are known: but for bad ones, they are all there.
            filtered = job.config.input.filter is not None
            counted = partial(_rows_there, out, files) if filtered else all_rows
            sample = sample_for(fit, [*files], counted)
            return VectorSource(absolute(out), snapshot, fit.base.finish[kept:], sample)
    return None


def vectors_at_hand(fit: PlannedFit, job: IdentifiedJob) -> VectorSource | None:
    """Return the vectors of a fit if they are there already, in `fit.from` or in the job's output.

    OutputError where `fit.from` is set and does not have them.
    """
    given = fit.section.source
    if given is not None and not FITS[fit.section.kind].pairs:
        source = served_vectors(given, fit, job)
        if source is None:
            raise OutputError(
                f"fit: {fit.name}: from: {given} serves no vectors of this encoder in float32 that"
                " end in the same finishing steps, or in fewer; leave from out, and they are"
                " embedded"
            )
        return source
    source = served_vectors(job.out, fit, job)
    if source is None or source.snapshot.faults or source.snapshot.left:
        return None
    if source.snapshot.limit is not None:
        return None
    return source if source.snapshot.input == job.input_paths else None


def other_vectors(fit: PlannedFit, job: IdentifiedJob) -> VectorSource | None:
    """Return the vectors that a fit reads beside its own; None where it reads none.

    OutputError where `fit.from` does not serve one vector of floats for each row.
    """
    if not FITS[fit.section.kind].pairs:
        return None
    other = absolute(fit.section.source)
    snapshot = newest_snapshot(other)
    claims = [] if snapshot is None else read_claims(other)
    recipes = [
        one.recipes["document"]
        for one in claims
        if snapshot is not None and one.fingerprint == snapshot.fingerprint
    ]
    if snapshot is None or not recipes or other == job.out:
        what = "is the job's own output" if other == job.out else "serves no snapshot"
        raise OutputError(
            f"fit: {fit.name}: from: {other} {what}; give the output whose vectors are searched"
        )
    dtype, keeps = recipes[0].get("vector_dtype"), recipes[0].get("aggregation") == "keep"
    keeps = keeps or recipes[0].get("long_text") in ("late_chunk", "split")
    if dtype not in ("float32", "float16") or keeps:
        raise OutputError(
            f"fit: {fit.name}: from: {other} has several vectors of a row, or {dtype}; needed is"
            " one of float32 or float16"
        )
    return VectorSource(other, snapshot)


def check_planned_fits(
    fits: Sequence[PlannedFit], places: Sequence[SamplePlace], job: IdentifiedJob
) -> None:
    """Check that what fits are yet to be made of is there, as far as can be known before.

    Raises:
        FitError: a fit has fewer rows than it needs, whatever they hold.
        OutputError: `fit.from` does not serve the vectors of a fit.
    """
    for fit in fits:
        if fit.made is not None:
            continue
        if problem := FITS[fit.section.kind].misfit(fit.section, fit.width):
            raise FitError(f"fit: {fit.name}: {problem}")
        rows = sum(place.stop - place.start for place in places)
        if other_vectors(fit, job) is None and fit.section.source is not None:
            source = vectors_at_hand(fit, job) if fit.base is not None else None
            if source is None:
                continue
            rows = source.snapshot.counts.get("rows", 0)
        most = rows if fit.section.sample is None else min(rows, fit.section.sample)
        least = FITS[fit.section.kind].fewest(fit.section, fit.width)
        # A row may have several vectors, and then fewer are enough.
        if most < least and not job.config.encoder.multi_vector:
            raise FitError(
                f"fit: {fit.name}: got {most} of {rows} rows, and it needs {least} at least;"
                f" {FITS[fit.section.kind].advice}, or leave the fit out"
            )


def sample_for(
    fit: PlannedFit,
    places: Iterable[SamplePlace],
    counted: Callable[[Sequence[SamplePlace]], Iterable[Rows]] = all_rows,
) -> Sample | None:
    """Return which rows of these places a fit takes; None for all. `counted` as in `sample_of`."""
    rows, seed = fit.section.sample, fit.section.seed
    return None if rows is None else sample_of(places, rows=rows, seed=seed, counted=counted)


def _rows_there(
    out: str, files: Mapping[SamplePlace, SnapshotFile], places: Sequence[SamplePlace]
) -> Iterator[Rows]:
    """Yield the numbers of the rows that an output's files hold."""
    for place in places:
        file = files[place]
        with open_unchanged(Stored(join(out, file.path), file.bytes, file.etag)) as source:
            rows = pq.ParquetFile(source).read(columns=["row"])["row"]
        # A row may have several lines.
        yield pc.unique(rows).to_numpy()


def _in_order(config: Job) -> list[Any]:
    """Return the fits that read vectors: first those of finishing steps, in order of the steps."""
    by_name = {fit.name: fit for fit in config.fit if not FITS[fit.kind].of_texts}
    steps = [by_name.pop(one.name) for one in config.encoder.finish if isinstance(one, FitStep)]
    return [*steps, *by_name.values()]


def _planned(job: IdentifiedJob, section: Any, made: Mapping[str, ArtefactHead]) -> PlannedFit:
    steps = tuple(takewhile(lambda step: not _applies(step, section), job.config.encoder.finish))
    cut = job.config.encoder.model_copy(update={"finish": steps, "vector_dtype": "float32"})
    base = _settled_recipe(cut, made)
    wide = _width(job, base, made)
    if any(isinstance(step, FitStep) and step.name not in made for step in steps):
        return PlannedFit(section, width=wide)
    hashed = fingerprint(base, job.digests)
    parameters = section.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    corpus = corpus_of(job.config.input, job.input_paths)
    seed = None if section.sample is None else section.seed
    sampled = [section.sample, seed, job.config.output.chunk_rows]
    return PlannedFit(
        section=section,
        base=base,
        fingerprint=hashed,
        width=wide,
        key=digest(canonical(["embedjob fit 1", parameters, hashed, corpus])),
        vectors=digest(canonical(["embedjob vectors 1", hashed, corpus, *sampled])),
    )


def _applies(step: Any, section: Any) -> bool:
    return isinstance(step, FitStep) and step.name == section.name


def _with_artefacts(job: IdentifiedJob, made: Mapping[str, ArtefactHead]) -> IdentifiedJob:
    """Return the job with the names of artefacts in its recipes, and what follows from them."""
    recipes = {role: _settled_recipe(recipe, made) for role, recipe in job.recipes.items()}
    encoder = _settled_recipe(job.config.encoder, made)
    return replace(
        job,
        config=job.config.model_copy(update={"encoder": encoder}),
        recipes=recipes,
        width=_width(job, encoder, made),
        fingerprint=fingerprint(encoder, job.digests),
    )


def _settled_recipe(recipe: Recipe, made: Mapping[str, ArtefactHead]) -> Recipe:
    steps = tuple(
        step.settled(made[step.name].sha256)
        if isinstance(step, FitStep) and step.name in made
        else step
        for step in recipe.finish
    )
    pooling = recipe.pooling
    if isinstance(pooling, WordWeights) and pooling.name in made:
        pooling = pooling.settled(made[pooling.name].sha256)
    return recipe.model_copy(update={"finish": steps, "pooling": pooling})


def _width(job: IdentifiedJob, recipe: Recipe, made: Mapping[str, ArtefactHead]) -> int:
    planned = {fit.name: getattr(fit, "dimensions", None) for fit in job.config.fit}
    widths = {**planned, **{head.sha256: head.width_after for head in made.values()}}
    views = views_once_fitted(recipe, job.config.fit)
    return width(job.view_width, views=views, recipe=recipe, fitted=widths)


def _require_named(job: IdentifiedJob) -> None:
    """Raise ConfigError where another role's recipe names a fit that the job's own lacks."""
    own = [step for step in job.config.encoder.finish if isinstance(step, FitStep)]
    sampled = job.config.encoder.continuations_fit
    for role, recipe in job.recipes.items():
        if recipe.continuations_fit not in (None, sampled):
            raise ConfigError(
                f"encoder.heads: continuations: the role {role} names {recipe.continuations_fit},"
                f" and the role {job.config.encoder.role}, whose texts are sampled, does not; name"
                " the same fit in both"
            )
        for step in recipe.finish:
            if isinstance(step, FitStep) and step not in own:
                raise ConfigError(
                    f"encoder.finish: {step.kind}: {step.name} is a step of the role {role}, and"
                    f" not of the role {job.config.encoder.role}, whose vectors are fitted; give"
                    " both roles this step"
                )
