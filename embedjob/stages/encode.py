"""ENCODE: a pool of actors, each with one encoder, turns token views into embeddings."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from embedjob.errors import DeviceLostError, InterruptedRunError
from embedjob.stages.actors import end_lost_device, load_or_stop, logged_warnings, watch
from embedjob.stages.attempts import begin_attempt, begin_parcel, limited
from embedjob.stages.chunk_state import ChunkState, Failure, describe, from_block, to_block
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.engine import EncodesViews, Engine
from embedjob.stages.reuse.repeated import encode_once

REPORT_SECONDS = 2.0


@dataclass(frozen=True)
class PoolSize:
    """The number of actors, and the resources that each requests from Ray.

    `generators` are the actors that generate texts beside them.
    """

    smallest: int
    largest: int
    cpus: float
    gpus: float
    generators: "PoolSize | None" = None


def encode(
    views: ray.data.Dataset, engine: Engine, *, pool: PoolSize, claim: ClaimAndCheck, ledger: Any
) -> ray.data.Dataset:
    """Return a dataset of chunk states that carry embeddings.

    Args:
        views: chunk states with token views.
        engine: loads the encoder, once per actor.
        pool: the actors' number and resources.
        claim: raises EmbedjobError if a freshly loaded encoder must not write to this output.
        ledger: the run's ledger.
    """
    return views.map_batches(
        EncodeActor,
        fn_constructor_args=(engine, claim, ledger),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=pool.smallest,
            max_size=pool.largest,
            # One chunk in the model and one at hand: more would wait here while other actors idle.
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )


class EncodeActor:
    """Hosts one encoder for the length of a run."""

    def __init__(self, engine: Engine, claim: ClaimAndCheck, ledger: Any) -> None:
        """Load the encoder and check it against the output's claim."""
        self._ledger = ledger
        self._stopping = threading.Event()
        self._encoder = self._load(engine, claim)
        self._free_since = time.monotonic()
        watch(self._stopping, lambda: ray.get(ledger.present.remote()))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's chunks with embeddings in place of views."""
        return to_block(self._encoded([*from_block(block)]))

    def _load(self, engine: Engine, claim: ClaimAndCheck) -> EncodesViews | None:
        def load() -> EncodesViews:
            encoder = engine.load_encoder()
            claim(encoder, engine)
            return encoder

        with logged_warnings() as notes:
            encoder = load_or_stop(load, self._ledger, what="encoder")
        if encoder is not None:
            self._ledger.ready.remote(ray.get_runtime_context().get_actor_id(), tuple(notes))
        return encoder

    def _encoded(self, states: Sequence[ChunkState]) -> Iterator[ChunkState]:
        begin_parcel(
            ("encode",), {s.chunk.key: _tokens(s) for s in states if s.views}, self._ledger
        )
        took: Counter[str] = Counter()
        before = None
        for state in states:
            encoded = self._encode(state, before)
            took.update(encoded.stats if encoded.encoded else {})
            yield encoded
            before = state.chunk.key
        if took:
            self._ledger.measured.remote("encode", took)

    def _encode(self, state: ChunkState, before: str | None) -> ChunkState:
        if state.failure or state.views is None:
            return state
        started = time.monotonic()
        key, tokens = state.chunk.key, _tokens(state)
        attempt = begin_attempt("encode", key, self._ledger, size=tokens, before=before)
        if isinstance(attempt, Failure) or self._encoder is None:
            stopped = Failure("abandoned", "the run is stopping")
            failure = attempt if isinstance(attempt, Failure) else stopped
            return ChunkState(state.chunk, failure=failure, stats=state.stats)
        try:
            with limited(attempt.seconds) as moved:
                stop, reporter = self._stopping.is_set, self._reporter(state, moved)
                views = partial(self._encoder.encode_views, stop=stop, on_progress=reporter)
                encoded = encode_once(state, views, self._ledger, stop=stop, moved=moved)
        except InterruptedRunError as error:
            self._ledger.abandon.remote(state.chunk.key)
            return ChunkState(state.chunk, failure=Failure("abandoned", str(error)))
        except DeviceLostError as error:
            end_lost_device(self._ledger, state.chunk.key, error)
        except Exception as error:  # a fault of one chunk; the others go on
            failure = Failure("fault", describe(error))
            return ChunkState(state.chunk, failure=failure, stats=state.stats)
        waited, self._free_since = started - self._free_since, time.monotonic()
        stats = {
            **state.stats,
            **encoded.stats,
            "wait_seconds": waited,
            "encode_seconds": self._free_since - started,
            "view_tokens": tokens,
        }
        return replace(state, views=None, encoded=encoded, stats=stats)

    def _reporter(self, state: ChunkState, moved: Callable[[], None]) -> Callable[[int, int], None]:
        reported = time.monotonic()
        # Where rows have passages, these are the texts.
        texts_each = max(1.0, state.stats.get("passages", 0) / max(1, state.stats.get("rows", 0)))

        def on_progress(texts: int, tokens: int) -> None:
            nonlocal reported
            moved()
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                self._ledger.progress.remote(state.chunk.key, int(texts / texts_each), tokens)

        return on_progress


def _tokens(state: ChunkState) -> int:
    return 0 if state.views is None else int(state.views.lengths.sum())
