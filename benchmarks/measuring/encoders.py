"""Both sides of the comparisons, loaded from the same weights in float32 on the CPU."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.measuring.texts import MINILM, SMOLLM
from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.models.sentence_transformers import folder_layer
from embedjob.models.source import ModelSource, materialize
from embedjob.text.views import TokenViews, assemble

Vectors = npt.NDArray[np.float32]
PROMPT = 'This sentence : "{text}" means in one word:"'


class Batch(NamedTuple):
    """Texts for a sentence-transformers model, and how it is to take them."""

    texts: list[str]
    batch_size: int
    chunk_size: int | None = None


def minilm_recipe() -> Recipe:
    """What the folder of all-MiniLM says of itself."""
    folder = folder_layer(materialize(ModelSource(MINILM)))
    return recipe_from({"model": MINILM, "dtype": "float32", **folder["encoder"]}, {})


def prompteol_recipe() -> Recipe:
    """SmolLM2 under PromptEOL: the state of the last token of the prompt."""
    return Recipe(model=SMOLLM, templates=(PROMPT,), span="last_token", dtype="float32")


def our_encode(recipe: Recipe) -> Callable[[list[str]], Vectors]:
    """Our encoder's `encode`, in a process that is an actor's."""
    import torch

    from embedjob.encoder.encoder import Encoder

    threads = torch.get_num_threads()
    return Encoder.from_recipe(recipe, device="cpu", threads=threads).encode


def minilm_peer() -> Any:
    """all-MiniLM as sentence-transformers loads it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(materialize(ModelSource(MINILM))), device="cpu")


def prompteol_peer() -> Any:
    """SmolLM2 in sentence-transformers with last-token pooling; its texts come in the prompt."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    folder = str(materialize(ModelSource(SMOLLM)))
    # By itself it would put every text into the chat template of the tokenizer.
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    transformer = Transformer(
        folder,
        model_kwargs={"dtype": "float32"},
        modality_config=text,
        module_output_name="token_embeddings",
    )
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def peer_encode(load: Callable[[], Any]) -> Callable[[Batch], Vectors]:
    """`SentenceTransformer.encode` in this process."""
    model = load()
    return lambda batch: model.encode(batch.texts, batch_size=batch.batch_size)


def peer_pool(
    load: Callable[[], Any], *, processes: int
) -> Callable[[Batch | None], Vectors | None]:
    """`SentenceTransformer.encode` over its own pool of single-thread processes."""
    # Its processes take as many threads as there are cores, unless this says otherwise.
    os.environ["OMP_NUM_THREADS"] = "1"
    model = load()
    pool = model.start_multi_process_pool(["cpu"] * processes)

    def encode(batch: Batch | None) -> Vectors | None:
        """The vectors of a batch; None ends the pool."""
        if batch is None:
            return model.stop_multi_process_pool(pool)
        return model.encode(
            batch.texts, batch_size=batch.batch_size, pool=pool, chunk_size=batch.chunk_size
        )

    return encode


def without_sharing(views: TokenViews) -> TokenViews:
    """The same views, each with all its ids."""
    return assemble(
        [views.full_ids(view).tolist() for view in range(len(views.prefix))],
        span=views.span,
        truncated=views.truncated,
        prefixes=[()] * views.views_per_text,
    )
