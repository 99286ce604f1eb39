"""Vectors made on a GPU against a padded float32 reference on the CPU, by model and dtype.

The reference is transformers alone: a padded batch, full forwards, eager attention, and the pooling
written out. Random weights, random lengths; a template with a prefix of 40 tokens, so that the
shared prefix is used too where attention is causal, and there also texts before several tails.

    python -m benchmarks.gpu.correctness [--texts 48] [--tiny]
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen3Config,
)

from benchmarks.gpu import making
from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.turns import least_cosine
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.views import TokenViews

LEAST_COSINES = {torch.float32: 0.99999, torch.bfloat16: 0.999}
PREFIX = 40
TAILS = (5, 9, 2)
SIZE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 64}
DECODERS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "mistral, window 64": lambda: MistralConfig(**GROUPED, sliding_window=64),
    "gemma2, window 64": lambda: Gemma2Config(**GROUPED, sliding_window=64),
}
ENCODERS: Mapping[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**SIZE),
    "modernbert": lambda: ModernBertConfig(
        **SIZE, local_attention=64, cls_token_id=1, sep_token_id=2
    ),
}


@torch.inference_mode()
def reference(model: Any, views: TokenViews) -> npt.NDArray[np.float32]:
    """Unit vectors of all views: one padded batch, and the mean of the span's states."""
    longest = int(views.lengths.max())
    count = len(views.lengths)
    ids = torch.zeros((count, longest), dtype=torch.long)
    seen, span = (torch.zeros((count, longest)) for _ in range(2))
    for view in range(count):
        found = torch.from_numpy(views.full_ids(view).astype(np.int64))
        ids[view, : len(found)] = found
        seen[view, : len(found)] = 1
        span[view, views.span[view, 0] : views.span[view, 1]] = 1
    states = model(input_ids=ids, attention_mask=seen.long()).last_hidden_state
    pooled = (states * span[..., None]).sum(dim=1) / span.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


def recipes(where: str, *, causal: bool) -> dict[str, Recipe]:
    """What is asked of a model: a prefix before the texts, and tails after them."""
    prefix, *tails = (one.strip() for one in making.texts([PREFIX, *TAILS], seed=3))
    if not causal:
        return {
            "all": Recipe(model=where, templates=(prefix + " {text}",), attention="bidirectional")
        }
    last = {"attention": "causal", "span": "last_token", "aggregation": "keep"}
    templates = {
        "prefix": (prefix + " {text}",),
        "tails": tuple(f"{{text}} {tail}" for tail in tails),
        "prefix and tails": tuple(f"{prefix} {{text}} {tail}" for tail in tails),
    }
    return {
        title: Recipe.model_validate({"model": where, "templates": some, **last})
        for title, some in templates.items()
    }


def check(
    where: str, name: str, device: torch.device, asked: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """The smallest cosine and the largest difference of one model, in both dtypes."""
    causal = name in DECODERS
    config = (DECODERS if causal else ENCODERS)[name]()
    weights = making.drawn(config, torch.device("cpu"), torch.float32)
    claims, figures = [], {}
    for title, asks in recipes(where, causal=causal).items():
        found, measured = compare(f"{name}, {title}", asks, weights, device, asked)
        claims += found
        figures |= measured
    return claims, figures


def compare(
    name: str, asks: Recipe, weights: Any, device: torch.device, asked: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """The same of one recipe."""
    lengths = making.lengths("lognormal", 150 * asked.texts, most=64 if asked.tiny else 400)
    views = load_tokenizer(asks).views(making.texts(lengths[: asked.texts]))
    plain = copy.deepcopy(weights)
    plain.set_attn_implementation("eager")
    expected = reference(plain, views)
    claims, figures = [], {}
    for dtype, least in LEAST_COSINES.items():
        # As an actor loads it: `.to(dtype)` would narrow buffers too, the rotary angles among them.
        model = making.drawn(weights.config, device, dtype)
        model.load_state_dict(weights.state_dict())
        found = Encoder(Backbone(model, attention=asks.attention), asks).encode_views(views)
        cosine = least_cosine(expected, found.embeddings)
        title = f"{name}, {str(dtype).removeprefix('torch.')}"
        expected = expected.reshape(found.embeddings.shape)
        claims.append(Claim(f"{title}: smallest cosine to the reference", cosine, floor=least))
        figures[f"{title}, largest difference"] = float(np.abs(expected - found.embeddings).max())
        figures[f"{title}, prefix tokens saved"] = found.stats["prefix_tokens_saved"]
    return claims, figures


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--tiny", action="store_true", help="few texts on the CPU: does it run?")
    asked = parser.parse_args()
    device = making.place(asked.tiny)
    # Else float32 products would be of ten bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    asked.texts = 8 if asked.tiny else asked.texts
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        where = making.folder(Path(work))
        for name in (*DECODERS, *ENCODERS):
            found, measured = check(where, name, device, asked)
            claims += found
            figures |= measured
    report(claims, figures, asked=vars(asked), machine=making.machine(device))


if __name__ == "__main__":
    main()
