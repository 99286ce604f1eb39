"""GENERATE: a pool of actors, each with one language model, makes texts of the texts of a chunk.

What is made is put before the chunk goes on, and read again wherever it was put before.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy

from embedjob.errors import ChunkError, DeviceLostError, InterruptedRunError
from embedjob.input.chunks import Chunk
from embedjob.job.generation_plan import generation_files, taken_over
from embedjob.job.planning import JobPlan
from embedjob.output.derived.generations import GenerationFiles
from embedjob.output.lease import Lease
from embedjob.stages.actors import end_lost_device, load_or_stop, watch
from embedjob.stages.attempts import STORAGE_SHARE, begin_attempt, begin_parcel, limited
from embedjob.stages.chunk_state import ChunkState, Failure, describe, from_block, to_block
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.cluster import threads_per_actor
from embedjob.stages.encode import PoolSize
from embedjob.stages.engine import Engine, Generates, PlannedFiles
from embedjob.stages.language.vllm_pass import VllmPass, generate_with_vllm, vllm_processor
from embedjob.stages.ledger import Attempt
from embedjob.stages.read import ReadRows, Then
from embedjob.stages.reuse.merging import lines_of_texts
from embedjob.stages.tokenize import VARIANTS
from embedjob.stages.write import require_seen
from embedjob.storage.retrying import CALL_SECONDS, patience
from embedjob.text.conversations import Variant, embedded_texts, text_hash

_REPORT_SECONDS = 1.0
# Of so many texts an actor keeps what was made: some ten megabytes.
_TEXTS_KEPT = 4096
Ask = Callable[[Sequence[str], int], Mapping[str, Sequence[Variant]] | None]


@dataclass(frozen=True)
class GeneratorHost:
    """What a generating actor needs beside its engine: where files lie, and on what it runs.

    `lease` is the run's: a node that does not see it has another disk at the output's path.
    `planned` are the models' files as planned, `threads` those of torch in each actor. With
    `vllm` another engine has generated before, and the actors only read.
    """

    files: GenerationFiles
    planned: PlannedFiles
    lease: Lease
    pool: PoolSize
    threads: int
    vllm: bool = False


def host_of(plan: JobPlan, pool: PoolSize, claim: ClaimAndCheck) -> GeneratorHost:
    """Return what the generating actors of a run need, whose recipe generates."""
    files, own = generation_files(plan.job), pool.generators
    assert files is not None, "the recipe generates nothing"
    files = replace(files, others=taken_over(files, plan.generated_in, plan.left))
    assert own is not None, "the generators have no pool"
    threads = threads_per_actor(own, beside=pool)
    made = plan.job.config.encoder.generate
    vllm = made is not None and made.engine == "vllm"
    return GeneratorHost(files, claim.files, claim.lease, own, threads, vllm)


def before_flow(plan: JobPlan, rows_of: ReadRows, host: GeneratorHost, *, ledger: Any) -> None:
    """Generate what is left with vLLM, where the job asks for it: it takes all chunks at once."""
    if not host.vllm:
        return
    config = plan.job.config
    vllm_pass = VllmPass(config.encoder.model_dump_json(), host.files)
    processor = vllm_processor(config.encoder, config.generator_pool)
    generate_with_vllm(plan.left, rows_of, vllm_pass, processor, ledger=ledger)


def generate(
    states: ray.data.Dataset, engine: Engine, then: Then, *, host: GeneratorHost, ledger: Any
) -> ray.data.Dataset:
    """Return a dataset of chunk states after `then`, with what was made of each of their texts.

    Args:
        states: chunk states with rows.
        engine: loads the generator, once per actor and only where something is left to make.
        then: how the actor tokenizes each state before it goes on to the next.
        host: where generations lie, and on what the actors run.
        ledger: the run's ledger.
    """
    pool = host.pool
    return states.map_batches(
        GenerateActor,
        fn_constructor_args=(engine, then, host, ledger),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=pool.smallest, max_size=pool.largest, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )


class GenerateActor:
    """Hosts one generator for the length of a run."""

    def __init__(self, engine: Engine, then: Then, host: GeneratorHost, ledger: Any) -> None:
        """Take what `generate` takes; the generator is loaded when it is first needed."""
        self._engine, self._then, self._host, self._ledger = engine, then, host, ledger
        self._generator: Generates | None = None
        self._seen = SeenTexts(_TEXTS_KEPT)
        self._stopping = threading.Event()
        watch(self._stopping, lambda: ray.get(ledger.stopping.remote()))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's chunks after `then`."""
        return to_block(self._through([*from_block(block)]))

    def _through(self, states: Sequence[ChunkState]) -> Iterator[ChunkState]:
        sizes = {
            state.chunk.key: float(state.chunk.text_bytes) for state in states if _has_rows(state)
        }
        begin_parcel(("generate", "tokenize"), sizes, self._ledger)
        before = None
        for state in states:
            yield self._then(self._generated(state, before))
            before = state.chunk.key

    def _generated(self, state: ChunkState, before: str | None) -> ChunkState:
        if state.failure or state.rows is None:
            return state
        chunk = state.chunk
        attempt = begin_attempt(
            "generate", chunk.key, self._ledger, size=chunk.text_bytes, before=before
        )
        if isinstance(attempt, Failure):
            return ChunkState(chunk, failure=attempt, stats=state.stats)
        try:
            with limited(attempt.seconds) as moved:
                return self._with_variants(
                    state, _Reporter(attempt, chunk.key, self._ledger, moved)
                )
        except InterruptedRunError as error:
            self._ledger.abandon.remote(chunk.key)
            return ChunkState(chunk, failure=Failure("abandoned", str(error)))
        except DeviceLostError as error:
            end_lost_device(self._ledger, chunk.key, error)
        except Exception as error:  # a fault of one chunk; the others go on
            return ChunkState(chunk, failure=Failure("fault", describe(error)), stats=state.stats)

    def _with_variants(self, state: ChunkState, reporter: "_Reporter") -> ChunkState:
        started = time.monotonic()
        assert state.rows is not None
        require_seen(self._host.lease)
        coded = pc.dictionary_encode(state.rows["text"].combine_chunks())
        every, files = coded.dictionary.to_pylist(), self._host.files
        old = lines_of_texts([text_hash(text) for text in every], state.reused)
        left = np.flatnonzero(old < 0).tolist()
        texts = [every[number] for number in left]
        if len(left) < len(every) and not self._host.vllm:
            files = files.of_some(state.chunk, texts)
        ask = partial(self._answers, state.chunk, reporter)
        stands = standing(state.chunk, texts, files, self._seen, ask, seconds=reporter.seconds)
        if stands is None:
            return ChunkState(state.chunk, failure=Failure("abandoned", "the run is stopping"))
        made, fresh = stands
        self._ledger.generated.remote(state.chunk.key)
        own: list[list[str]] = [[] for _ in every]
        for number, text, one in zip(left, texts, made, strict=True):
            own[number] = embedded_texts(text, one)
        column = pa.array(own, pa.large_list(pa.large_string())).take(coded.indices)
        seconds = time.monotonic() - started
        took = {"generate_seconds": seconds, "text_bytes": float(state.chunk.text_bytes)}
        self._ledger.measured.remote("generate", took)
        stats = {**state.stats, **counts(texts, made, fresh), "generate_seconds": seconds}
        return replace(state, rows=state.rows.append_column(VARIANTS, column), stats=stats)

    def _answers(
        self, chunk: Chunk, reporter: "_Reporter", texts: Sequence[str], known: int
    ) -> dict[str, Sequence[Variant]] | None:
        """Return what the generator makes of texts; None where it does not load."""
        if self._host.vllm:
            raise ChunkError(
                f"{chunk.shard.url}, rows {chunk.start} to {chunk.stop}: vLLM has put no"
                " generations of it, because its pass was ended, or could not read the chunk; run"
                " again"
            )
        reporter.known(known)
        if not any(text.strip() for text in texts):
            return {}  # nothing is asked about a blank text
        generator = self._loaded()
        if generator is None:
            return None
        stop, moved = self._stopping.is_set, reporter.moved
        answers = generator.generate(texts, stop=stop, moved=moved, answered=reporter.answered)
        return dict(zip(texts, answers, strict=True))

    def _loaded(self) -> Generates | None:
        """Return the generator; None where it does not load, which stops the run."""
        if self._generator is None:
            self._generator = load_or_stop(self._load, self._ledger, what="generator")
        return self._generator

    def _load(self) -> Generates:
        generator = self._engine.load_generator(threads=self._host.threads)
        self._host.planned.check()
        return generator


class _Reporter:
    """Says how far a generator is inside a chunk: at every step, and after each batch."""

    def __init__(self, attempt: Attempt, key: str, ledger: Any, moved: Callable[[], None]) -> None:
        self._key, self._ledger, self._moved = key, ledger, moved
        # Storage in trouble may take so long, before or after the generator.
        self.seconds = STORAGE_SHARE * attempt.seconds
        self._known = 0
        self._reported = time.monotonic()

    def known(self, answers: int) -> None:
        """Note answers that were there already."""
        self._known = answers
        self.answered(0, 0)

    def answered(self, answers: int, tokens: int) -> None:
        """Note so many answers of so many tokens together."""
        self._ledger.answered.remote(self._key, self._known + answers, tokens)

    def moved(self) -> None:
        """Note that the generator got on; encoders are there, and idle: the run does not stall."""
        self._moved()
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            self._ledger.moved.remote()


def standing(
    chunk: Chunk,
    texts: Sequence[str],
    files: GenerationFiles,
    seen: "SeenTexts",
    ask: Ask,
    *,
    seconds: float = CALL_SECONDS,
) -> tuple[Sequence[Sequence[Variant]], frozenset[str]] | None:
    """Return what stands for each of a chunk's texts, and which of them were asked about for that.

    What the chunk's file has is read. Else what is known of texts is taken over, the others are
    asked about, and the file is put. None where nobody answers.

    Args:
        chunk: the chunk.
        texts: its distinct texts.
        files: where generations lie.
        seen: what was put for texts of chunks before; those of this chunk are added.
        ask: gives the answers about texts, and is told how many others are known.
        seconds: how long storage that is in trouble is waited for, before and after.
    """
    fresh = frozenset[str]()
    with patience(seconds):
        made = files.read(chunk, texts)
        known = {} if made is not None else {**seen.of(texts), **files.known(chunk)}
    if made is None:
        fresh = frozenset(text for text in texts if text_hash(text) not in known)
        answers = ask([text for text in texts if text in fresh], sum(map(len, known.values())))
        if answers is None:
            return None
        every = [answers.get(text) or known.get(text_hash(text), ()) for text in texts]
        with patience(seconds):
            made = files.put(chunk, texts, every)
    seen.add(texts, made)
    return made, fresh


class SeenTexts:
    """What was put for the texts that an actor has met last, so many of them at most."""

    def __init__(self, most: int) -> None:
        """Begin with no text."""
        self._most = most
        self._made: dict[bytes, Sequence[Variant]] = {}

    def add(self, texts: Sequence[str], made: Sequence[Sequence[Variant]]) -> None:
        """Note what stands for texts; those that were met first are forgotten."""
        for text, variants in zip(texts, made, strict=True):
            key = text_hash(text)
            self._made.pop(key, None)
            self._made[key] = variants
        for key in [*self._made][: max(0, len(self._made) - self._most)]:
            del self._made[key]

    def of(self, texts: Sequence[str]) -> dict[bytes, Sequence[Variant]]:
        """Return what stands for those of these texts that are known, by their hashes."""
        keys = map(text_hash, texts)
        return {key: self._made[key] for key in keys if key in self._made}


def counts(
    texts: Sequence[str], made: Sequence[Sequence[Variant]], fresh: Collection[str]
) -> dict[str, float]:
    """Return what was generated now, what was there already, and where the text stands for it.

    `fresh` are the texts that the generator was asked about now.
    """
    pairs = [(text in fresh, one) for text, own in zip(texts, made, strict=True) for one in own]
    said = Counter(new for new, one in pairs if one.text is not None)
    return {
        "generated": said[True],
        "generated_tokens": sum(one.tokens for new, one in pairs if new),
        "generations_reused": said[False],
        "generation_fallbacks": len(pairs) - said.total(),
    }


def _has_rows(state: ChunkState) -> bool:
    return state.rows is not None and state.failure is None
