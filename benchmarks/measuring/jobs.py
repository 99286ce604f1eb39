"""One job on both sides: ours, and what Ray's documentation shows for sentence-transformers.

They have a module of their own because Ray's workers import it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.measuring.encoders import Batch, minilm_peer, peer_encode
from benchmarks.measuring.texts import MINILM


class Place(NamedTuple):
    """One run: the Ray it joins, where its rows are, and where their vectors go."""

    address: str
    rows: str
    out: str


class Setting(NamedTuple):
    """How the peer is run."""

    actors: int
    threads: int
    rows_per_call: int
    batch_size: int


class PeerActor:
    """What Ray's documentation shows for batch inference with embeddings."""

    def __init__(self, threads: int, batch_size: int) -> None:
        """Loads the model once per actor."""
        import torch

        torch.set_num_threads(threads)
        self._encode = peer_encode(minilm_peer)
        self._batch_size = batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its embeddings."""
        texts = batch.pop("text").tolist()
        return {**batch, "embedding": self._encode(Batch(texts, self._batch_size))}


def peer(place: Place, setting: Setting) -> None:
    """The job as a user of Ray Data would write it."""
    import ray

    ray.init(address=place.address, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Small files are read into one block, which would leave one actor with nothing to do.
    per_block = setting.rows_per_call
    rows = ray.data.read_parquet(place.rows).repartition(target_num_rows_per_block=per_block)
    embedded = rows.map_batches(
        PeerActor,
        fn_constructor_args=(setting.threads, setting.batch_size),
        batch_size=setting.rows_per_call,
        compute=ray.data.ActorPoolStrategy(size=setting.actors),
        # With a whole core for each of two actors, Ray Data would have none left to read with.
        num_cpus=0.5,
    )
    embedded.write_parquet(place.out)
    ray.shutdown()


def ours(place: Place) -> dict[str, Any]:
    """The same job by embedjob; the summary of its run."""
    from embedjob.config.job_file import JobSource, Layer
    from embedjob.job.options import Console, Options
    from embedjob.pipeline import embed

    job = {
        "input": {"path": place.rows, "text": "text", "id": "id"},
        "encoder": {"model": MINILM, "dtype": "float32"},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": place.out},
    }

    @contextmanager
    def shown(_: Any) -> Iterator[Callable[[Any], None]]:
        yield lambda tally: None

    draft = JobSource((Layer("benchmark", job),))
    result = embed(draft, Options(address=place.address), Console(print, shown))
    assert not result.faults, result.verdict
    return result.summary.as_dict()
