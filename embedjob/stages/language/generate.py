"""GENERATE: a pool of actors, each with one language model, makes texts of the texts of a chunk.

What is made is put before the chunk goes on, and read again wherever it was put before.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy

from embedjob.errors import ChunkError, DeviceLostError, InterruptedRunError
from embedjob.job.output import generation_files
from embedjob.job.planning import JobPlan
from embedjob.output.derived.generations import GenerationFiles
from embedjob.output.lease import Lease
from embedjob.stages.actors import end_lost_device, load_or_stop, watch
from embedjob.stages.attempts import begin_attempt, begin_parcel, limited
from embedjob.stages.chunk_state import ChunkState, Failure, describe, from_block, to_block
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.cluster import threads_per_actor
from embedjob.stages.encode import PoolSize
from embedjob.stages.engine import Engine, Generates, PlannedFiles
from embedjob.stages.language.vllm_pass import VllmPass, generate_with_vllm, vllm_processor
from embedjob.stages.read import ReadRows, Then
from embedjob.stages.tokenize import VARIANTS
from embedjob.stages.write import require_seen
from embedjob.text.conversations import Variant, embedded_texts

_REPORT_SECONDS = 1.0


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
    files, own = generation_files(plan), pool.generators
    assert files is not None, "the recipe generates nothing"
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
    of = VllmPass(config.encoder.model_dump_json(), host.files)
    processor = vllm_processor(config.encoder, config.generator_pool)
    generate_with_vllm(plan.left, rows_of, of, processor, ledger=ledger)


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
                return self._with_variants(state, self._reporter(moved))
        except InterruptedRunError as error:
            self._ledger.abandon.remote(chunk.key)
            return ChunkState(chunk, failure=Failure("abandoned", str(error)))
        except DeviceLostError as error:
            end_lost_device(self._ledger, chunk.key, error)
        except Exception as error:  # a fault of one chunk; the others go on
            return ChunkState(chunk, failure=Failure("fault", describe(error)), stats=state.stats)

    def _with_variants(self, state: ChunkState, moved: Callable[[], None]) -> ChunkState:
        started = time.monotonic()
        assert state.rows is not None
        require_seen(self._host.lease)
        coded = pc.dictionary_encode(state.rows["text"].combine_chunks())
        texts = coded.dictionary.to_pylist()
        files = self._host.files
        made = files.read(state.chunk, texts)
        reused = made is not None
        if made is None and self._host.vllm:
            raise ChunkError(
                f"{state.chunk.shard.url}, rows {state.chunk.start} to {state.chunk.stop}: vLLM has"
                " put no generations of it, because its pass was ended, or could not read the"
                " chunk; run again"
            )
        if made is None:
            generator = self._loaded()
            if generator is None:
                return ChunkState(state.chunk, failure=Failure("abandoned", "the run is stopping"))
            answers = generator.generate(texts, stop=self._stopping.is_set, moved=moved)
            made = files.put(state.chunk, texts, answers)
        own = [embedded_texts(text, one) for text, one in zip(texts, made, strict=True)]
        column = pa.array(own, pa.large_list(pa.large_string())).take(coded.indices)
        stats = {
            **state.stats,
            **counts(made, reused=reused),
            "generate_seconds": time.monotonic() - started,
        }
        return replace(state, rows=state.rows.append_column(VARIANTS, column), stats=stats)

    def _loaded(self) -> Generates | None:
        """Return the generator; None where it does not load, which stops the run."""
        if self._generator is None:
            self._generator = load_or_stop(self._load, self._ledger, what="generator")
        return self._generator

    def _load(self) -> Generates:
        generator = self._engine.load_generator(threads=self._host.threads)
        self._host.planned.check()
        return generator

    def _reporter(self, moved: Callable[[], None]) -> Callable[[], None]:
        reported = time.monotonic()

        def on_step() -> None:
            nonlocal reported
            moved()
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                # Encoders are there, and idle: the run does not stall.
                self._ledger.moved.remote()

        return on_step


def counts(made: Sequence[Sequence[Variant]], *, reused: bool) -> dict[str, float]:
    """Return what was generated now, what was there already, and where the text stands for it."""
    every = [one for variants in made for one in variants]
    said = sum(one.text is not None for one in every)
    return {
        "generated": 0 if reused else said,
        "generated_tokens": 0 if reused else sum(one.tokens for one in every),
        "generations_reused": said if reused else 0,
        "generation_fallbacks": len(every) - said,
    }


def _has_rows(state: ChunkState) -> bool:
    return state.rows is not None and state.failure is None
