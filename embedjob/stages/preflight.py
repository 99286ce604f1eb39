"""One look around from inside the cluster, before a model is loaded on a paid GPU."""

import ray

from embedjob import storage
from embedjob.create_only import require_create_only
from embedjob.errors import AccessError, EmbedjobError
from embedjob.stages.engine import Engine


def preflight(engine: Engine, *, shard: str, out: str) -> None:
    """Raises EmbedjobError if a worker cannot see the input, write the output, or tokenize."""
    problem = ray.get(_look.remote(engine, shard, out))
    if problem is not None:
        raise problem


@ray.remote(num_cpus=1, max_retries=2)
def _look(engine: Engine, shard: str, out: str) -> EmbedjobError | None:
    # Errors come back as values: Ray wraps a raised one in the worker's traceback.
    try:
        if storage.stat(shard) is None:
            return AccessError(f"{shard}: the driver sees this shard and a worker node does not")
        require_create_only(out)
        engine.load_tokenizer()
    except EmbedjobError as error:
        return error
    return None
