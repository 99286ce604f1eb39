"""Fits that read texts: a job takes what they have made before any vector is planned.

A vocabulary becomes the job's model, continuations stand in its head, and counts of words are named
by its pooling.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.heads import Continuations, TokenIds
from embedjob.config.recipe import Recipe
from embedjob.errors import OutputError
from embedjob.job.planned_fits import PlannedFit, corpus_of, recorded_fit
from embedjob.job.resolve import IdentifiedJob, ResolvedJob, identify
from embedjob.models.source import materialize, source_of
from embedjob.output.file_names import digest
from embedjob.output.fingerprint import canonical, fingerprint
from embedjob.output.fits.artefacts import ArtefactHead, read_artefact, tensors_url
from embedjob.output.fits.records import Record
from embedjob.vectors.fits.continuation_ids import continuation_ids
from embedjob.vectors.vocabulary import SKETCH

# Takes the place of the fingerprint of a fit that needs no encoder.
_NO_ENCODER = "0" * 64


def with_text_fits(
    job: IdentifiedJob, records: Mapping[str, Record], made: dict[str, ArtefactHead], *, refit: bool
) -> tuple[IdentifiedJob, list[PlannedFit]]:
    """Return the job with what its fits of texts have made, and these fits.

    What is named by the pooling is added to `made`, by the names of the fits.
    """
    fits = []
    for section in (one for one in job.config.fit if FITS[one.kind].of_texts):
        fit = _planned(job, section)
        if record := records.get(fit.key):
            fit = recorded_fit(job.out, fit, record, refit=refit)
        if fit.made is not None:
            try:
                job = _TAKEN[section.kind](job, fit.name, fit.made, made)
            except OutputError:  # its tensors are damaged
                if not refit:
                    raise
                fit = replace(fit, made=None)
        fits.append(fit)
    return job, fits


def before_heads(recipe: Recipe) -> Recipe:
    """Return the recipe of the views that continuations are sampled after."""
    plain = {"heads": (), "aggregation": "mean", "finish": (), "vector_dtype": "float32"}
    return recipe.model_copy(update=plain)


def _planned(job: IdentifiedJob, section: Any) -> PlannedFit:
    """Return a fit of texts; its key is made of the corpus and of how texts are read."""
    recipe = job.config.encoder
    hashed, by = _NO_ENCODER, list[Any]()
    if FITS[section.kind].is_model:  # the section itself says how texts are cut
        width = SKETCH
    elif section.kind == "word_counts":
        width, by = job.model.vocabulary or 0, [dict(job.digests), recipe.max_tokens]
    else:
        width, hashed = section.number, fingerprint(before_heads(recipe), job.digests)
        by = [hashed]
    parameters = section.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    corpus = corpus_of(job.config.input, job.input_paths)
    return PlannedFit(
        section=section,
        width=width,
        base=recipe,
        fingerprint=hashed,
        key=digest(canonical([f"embedjob {section.kind} 1", parameters, corpus, *by])),
    )


def _as_model(
    job: IdentifiedJob, name: str, head: ArtefactHead, made: dict[str, ArtefactHead]
) -> IdentifiedJob:
    """Return the job with a vocabulary as its model."""
    return identify(_renamed(job, tensors_url(job.out, head)))


def _as_weights(
    job: IdentifiedJob, name: str, head: ArtefactHead, made: dict[str, ArtefactHead]
) -> IdentifiedJob:
    """Note the counts of words, which the pooling names."""
    made[name] = head
    return job


def _in_head(
    job: IdentifiedJob, name: str, head: ArtefactHead, made: dict[str, ArtefactHead]
) -> IdentifiedJob:
    """Return the job with continuations in the heads that name their fit."""
    ids = continuation_ids(read_artefact(job.out, head.kind, head.sha256))
    recipes = {role: _with_ids(recipe, name, ids) for role, recipe in job.recipes.items()}
    encoder = _with_ids(job.config.encoder, name, ids)
    config = job.config.model_copy(update={"encoder": encoder})
    return replace(job, config=config, recipes=recipes)


# What takes the artefact of each kind of fit of texts.
_TAKEN = {"vocabulary": _as_model, "word_counts": _as_weights, "continuations": _in_head}


def _with_ids(recipe: Recipe, name: str, ids: tuple[TokenIds, ...]) -> Recipe:
    heads = tuple(
        head.settled(ids) if isinstance(head, Continuations) and head.fit == name else head
        for head in recipe.heads
    )
    return recipe.model_copy(update={"heads": heads})


def _renamed(job: ResolvedJob, model: str) -> ResolvedJob:
    """Return a resolved job whose model is another of its kind, at this path or URL."""
    config = job.config.model_copy(
        update={"encoder": job.config.encoder.model_copy(update={"model": model})}
    )
    recipes = {
        role: recipe.model_copy(update={"model": model}) for role, recipe in job.recipes.items()
    }
    folder = materialize(source_of(config.encoder), tokenizer_only=True)
    return ResolvedJob(config, recipes, job.origins, folder, job.input_paths)
