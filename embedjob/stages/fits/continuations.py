"""Continuations by Ray tasks: texts are drawn from the corpus, and the model goes on after each.

Which texts are drawn depends on the seed and on their places alone: each row has a key, and the
distinct good texts with the smallest keys are taken. So any cluster draws the same.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from embedjob.config.fits.fit_kinds import SampledContinuations
from embedjob.config.job import Input, Sample, SampledInput
from embedjob.config.recipe import Recipe
from embedjob.errors import FitError
from embedjob.input.chunks import Chunk
from embedjob.input.samples import SamplePlace, has_chunk, row_keys, sample_of
from embedjob.job.options import Console
from embedjob.job.resolve import IdentifiedJob
from embedjob.job.text_fits import before_heads
from embedjob.stages.chunk_state import raised_in_worker
from embedjob.stages.cluster import size_pool, threads_per_actor
from embedjob.stages.engine import PlannedFiles
from embedjob.stages.fits.term_counts import good_rows, grouped
from embedjob.stages.read import memory_of
from embedjob.vectors.fits.continuation_ids import fitted_continuations
from embedjob.vectors.fits.fitted import Fitted

# So many rows are looked at for each text that is wanted: some are bad, or blank, or repeated.
_ROWS_PER_TEXT = 8


class Drawn(NamedTuple):
    """A text, and what orders it among all others."""

    key: int
    shard: str
    row: int
    text: str


class Sampler(NamedTuple):
    """How a task samples: the recipe of the views, the files that it needs, and where it runs."""

    recipe_json: str
    files: PlannedFiles
    section: SampledContinuations
    gpus: int
    threads: int


def sampled_continuations(
    chunks: Sequence[Chunk], job: IdentifiedJob, section: SampledContinuations, console: Console
) -> Fitted:
    """Return the continuations of a fit: of texts that are drawn from all good rows of chunks.

    Raises:
        FitError: there are fewer distinct texts than the fit samples after.
        FaultError: a chunk cannot be read, or the cluster is lost.
        ResourceError: no node can hold the model.
    """
    config = job.config
    try:
        texts = _drawn(chunks, config.input, section)
        pool = size_pool(
            config.pool.model_copy(update={"actors": 1}),
            chunks=1,
            wait=config.run.resource_wait_seconds,
            say=console.say,
        )
        whole = config.encoder.model_dump_json()
        sampler = Sampler(
            before_heads(config.encoder).model_dump_json(),
            PlannedFiles(whole, tuple(job.digests.items())),
            section,
            gpus=max(1, int(pool.gpus)),
            threads=threads_per_actor(pool),
        )
        place = ray.remote(continued_texts).options(num_cpus=pool.cpus, num_gpus=pool.gpus)
        ids = ray.get(place.remote(texts, sampler))
    except RayError as error:
        raise raised_in_worker(error, "continuations cannot be sampled") from error
    return fitted_continuations(ids, texts=len(texts))


def _drawn(
    chunks: Sequence[Chunk], job_input: Input, section: SampledContinuations
) -> tuple[str, ...]:
    """Return the distinct texts with the smallest keys, as many as a fit samples after."""
    places = (SamplePlace(one.shard.url, one.start, one.stop) for one in chunks)
    # A filter may pass few rows, so that none is left out before it.
    rows = _ROWS_PER_TEXT * section.sample if job_input.filter is None else sys.maxsize
    sample = sample_of(places, rows=rows, seed=section.seed)
    some = [one for one in chunks if sample is None or has_chunk(sample, one.shard.url, one.start)]
    if not some:
        raise FitError("there are no texts; are all shards empty, or their rows filtered out?")
    draw: Any = ray.remote(first_texts).options(num_cpus=1, memory=memory_of(some))
    found = ray.get([draw.remote(one, job_input, sample, section) for one in grouped(some)])
    texts = tuple(one.text for one in distinct_draws([one for each in found for one in each]))
    if len(texts) < section.sample:
        looked_at = min(sum(one.rows for one in chunks), rows)
        raise FitError(
            f"got {len(texts)} distinct texts in {looked_at} rows, and it needs {section.sample};"
            " set a smaller sample"
        )
    return texts[: section.sample]


def first_texts(
    group: Sequence[Chunk], job_input: Input, sample: Sample | None, section: SampledContinuations
) -> list[Drawn]:
    """Return the distinct good texts of some chunks with the smallest keys."""
    found: list[Drawn] = []
    if sample is not None:
        job_input = SampledInput.model_construct(**{**dict(job_input), "sample": sample})
    for chunk, good in good_rows(group, job_input):
        keys = row_keys(chunk.shard.url, good["row"].to_numpy(), seed=section.seed).tolist()
        texts, numbers = good["text"].to_pylist(), good["row"].to_pylist()
        found += [
            Drawn(key, chunk.shard.url, number, text)
            for key, number, text in zip(keys, numbers, texts, strict=True)
            if text.strip()
        ]
        found = distinct_draws(found)[: section.sample]
    return found


def distinct_draws(drawn: Iterable[Drawn]) -> list[Drawn]:
    """Return texts in the order of their keys, each once."""
    first: dict[str, Drawn] = {}
    for one in sorted(drawn):
        first.setdefault(one.text, one)
    return [*first.values()]


def continued_texts(texts: Sequence[str], sampler: Sampler) -> list[list[int]]:
    """Return the continuations of all texts, in order; ModelError if the files are not the plan's.

    A task of its own: the driver needs no torch.
    """
    from embedjob.encoder.trajectories import sampled_after

    ids = sampled_after(
        Recipe.model_validate_json(sampler.recipe_json),
        texts,
        sampler.section,
        gpus=sampler.gpus,
        threads=sampler.threads,
    )
    sampler.files.check()
    return ids
