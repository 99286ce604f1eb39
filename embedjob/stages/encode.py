"""ENCODE: a pool of actors, each with one encoder, turns token views into embeddings."""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from embedjob.errors import AccessError, DeviceLostError, InterruptedRunError, RefusedError
from embedjob.stages.attempts import begin_attempt, begin_parcel, limited
from embedjob.stages.chunk_state import ChunkState, Failure, describe, from_block, to_block
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.engine import EncodesViews, Engine

REPORT_SECONDS = 2.0
LOAD_PAUSE = 5.0


@dataclass(frozen=True)
class PoolSize:
    """The number of actors, and the resources that each requests from Ray."""

    smallest: int
    largest: int
    cpus: float
    gpus: float


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
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's chunks with embeddings in place of views."""
        return to_block(self._encoded([*from_block(block)]))

    def _load(self, engine: Engine, claim: ClaimAndCheck) -> EncodesViews | None:
        # A constructor that raises would end the run with a traceback: a model that does not load
        # is reported to the driver, and the run stops by itself.
        try:
            with _logged_warnings() as notes:
                encoder = engine.load_encoder()
                claim(encoder, engine)
        except Exception as error:
            # The nodes that were there at first have access: a node that joined late may lack it.
            if isinstance(error, RefusedError) and not isinstance(error, AccessError):
                ray.get(self._ledger.refuse.remote(_unloaded(error)))
            else:
                self._failed_to_load(error)
            return None
        self._ledger.ready.remote(ray.get_runtime_context().get_actor_id(), tuple(notes))
        return encoder

    def _failed_to_load(self, error: Exception) -> None:
        """Return if this stops the run; else end this process, for another one to be started."""
        node = ray.get_runtime_context().get_node_id()
        alone = sum(known["Alive"] for known in ray.nodes()) == 1
        failed = self._ledger.failed_to_load.remote(_unloaded(error), node, alone=alone)
        if ray.get(failed):
            return
        # A bad node would fail again and again while a good one still loads.
        time.sleep(LOAD_PAUSE)
        _exit_process(_unloaded(error))

    def _encoded(self, states: Sequence[ChunkState]) -> Iterator[ChunkState]:
        begin_parcel(
            ("encode",), {s.chunk.key: _tokens(s) for s in states if s.views}, self._ledger
        )
        before = None
        for state in states:
            yield self._encode(state, before)
            before = state.chunk.key

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
                reporter = self._reporter(state, moved)
                encoded = self._encoder.encode_views(
                    state.views, stop=self._stopping.is_set, on_progress=reporter
                )
        except InterruptedRunError as error:
            self._ledger.abandon.remote(state.chunk.key)
            return ChunkState(state.chunk, failure=Failure("abandoned", str(error)))
        except DeviceLostError as error:
            # This actor would take chunk after chunk and fail them all. The attempt is counted, and
            # Ray runs it again in a new process.
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
            device = f"GPU {gpu} of node {socket.gethostname()}"
            ray.get(self._ledger.lost.remote(state.chunk.key, device))
            _exit_process(f"{state.chunk.key}: {error}")
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

        def on_progress(texts: int, tokens: int) -> None:
            nonlocal reported
            moved()
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                self._ledger.progress.remote(state.chunk.key, texts, tokens)

        return on_progress

    def _watch(self) -> None:
        while not self._stopping.is_set():
            if ray.get(self._ledger.present.remote()):
                self._stopping.set()
            time.sleep(1.0)


def _tokens(state: ChunkState) -> int:
    return 0 if state.views is None else int(state.views.lengths.sum())


def _unloaded(error: Exception) -> str:
    return f"the encoder did not load: {describe(error)}"


def _exit_process(reason: str) -> NoReturn:
    """End this process; Ray starts another, perhaps on a better node."""
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """Collect embedjob's logged warnings, such as that a model is encoded in a slower way."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("embedjob")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
