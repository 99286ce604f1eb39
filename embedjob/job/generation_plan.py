"""The generations of a job as planned: where they lie, and how many are left to be made."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from embedjob.input.chunks import Chunk
from embedjob.job.resolve import IdentifiedJob
from embedjob.output.derived.generations import GenerationFiles
from embedjob.output.fingerprint import generation_fingerprint, text_projection
from embedjob.storage.objects import list_files


@dataclass(frozen=True)
class PlannedGeneration:
    """What is left for a run's generator: at most `texts` texts, of `tokens` tokens in all.

    Fewer are made where texts are equal, blank or filtered out, and where an answer is short.
    """

    texts: int
    tokens: int

    def as_dict(self) -> dict[str, int]:
        """Return both as plain JSON values."""
        return asdict(self)


def generation_files(job: IdentifiedJob) -> GenerationFiles | None:
    """Return where the generations of a job lie; None where its recipe makes none."""
    made = job.config.encoder.generate
    if made is None:
        return None
    fingerprint = generation_fingerprint(made, job.digests)
    return GenerationFiles(job.out, fingerprint, text_projection(job.config.input))


def planned_generation(job: IdentifiedJob, left: Sequence[Chunk]) -> PlannedGeneration | None:
    """Return what is left to be generated for chunks that are left; None without a generator.

    What the job's output has already is listed here.
    """
    files, made = generation_files(job), job.config.encoder.generate
    if files is None or made is None:
        return None
    here = {file.name for file in list_files(files.folder(files.out))} if left else frozenset()
    rows = sum(chunk.rows for chunk in left if files.name(chunk) not in here)
    texts = rows * made.texts * (2 if made.summaries else 1)
    return PlannedGeneration(texts, texts * made.max_new_tokens)


def taken_over(
    files: GenerationFiles, outs: Collection[str], left: Sequence[Chunk]
) -> dict[str, list[str]]:
    """Return the files of other outputs that have generations of chunks, by their name."""
    wanted = {files.name(chunk) for chunk in left} if outs else frozenset()
    others: dict[str, list[str]] = {}
    for out in outs:
        for file in list_files(files.folder(out)):
            if file.name in wanted:
                others.setdefault(file.name, []).append(file.url)
    return others
