"""What the programs for a GPU are fed: random weights of known shapes, and texts of known lengths.

Nothing is fetched: weights are drawn on the device, and the tokenizer knows single bytes, so that a
text has as many tokens as characters.
"""

import copy
import platform
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedModel

from benchmarks.measuring.turns import Turns, quickest, take_turns
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.models.tokenizer import load_tokenizer

LLAMAS: Mapping[str, Mapping[str, int]] = {
    # The shapes of Qwen3-0.6B, Qwen2-1.5B and Llama-7B.
    "0.6B": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "1.5B": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7B": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_POSITIONS = 8192
_MATMUL = 8192


def place(tiny: bool) -> torch.device:
    """The GPU, or the CPU for a tiny run; without either the program ends and says so."""
    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA device; --tiny shows on the CPU that the program runs")
        sys.exit(0)
    return torch.device("cuda")


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: date, versions, and the device."""
    packages = ("torch", "transformers", "tokenizers", "sentence-transformers")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "device": f"{device.type}, {name}",
        "CUDA": torch.version.cuda,
    }


def llama(size: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of that size with random weights."""
    config = LlamaConfig(**LLAMAS[size], max_position_embeddings=_POSITIONS)
    return drawn(config, device, dtype)


def bert(tiny: bool, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """BERT base, 109M parameters, with random weights."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return drawn(BertConfig(**(small if tiny else {})), device, dtype)


def drawn(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, its weights drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModel.from_config(config, dtype=dtype)
    return model.eval()


def folder(where: Path) -> str:
    """A model folder for its tokenizer alone; the weights in it are of a tiny model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"[PAD]": 0, **{letter: 1 + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[PAD]"])
    llama("tiny", torch.device("cpu"), torch.float32).save_pretrained(where)
    tokenizer.save(str(where / "tokenizer.json"))
    settings = (
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]",'
        f' "model_max_length": {_POSITIONS}}}'
    )
    (where / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return str(where)


def texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Words of five random letters, cut to so many characters, hence tokens."""
    random = np.random.default_rng(seed)
    letters = np.array(list(string.ascii_lowercase))
    found = []
    for length in lengths:
        drawn_letters = random.choice(letters, int(length))
        drawn_letters[5:-1:6] = " "
        found.append("".join(drawn_letters))
    return found


def lengths(kind: str, tokens: int, *, most: int = 2048) -> list[int]:
    """So many tokens in texts of one length, or of lognormal lengths (median 200)."""
    if kind != "lognormal":
        return [int(kind)] * max(4, tokens // int(kind))
    random = np.random.default_rng(1)
    found = np.clip(random.lognormal(np.log(200), 0.9, 4 + tokens // 150), 4, most).astype(int)
    return found[: max(4, int(np.searchsorted(np.cumsum(found), tokens)))].tolist()


def peer(where: str, model: PreTrainedModel, *, pooling: str) -> Any:
    """A sentence-transformers model with a copy of these weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    transformer = Transformer(where)
    # A copy: what the other side sets on its model is not to change this one.
    transformer.model = copy.deepcopy(model)
    # As it sets on every model that it loads itself: a cache would be filled in vain.
    transformer.model.config.use_cache = False
    pooled = Pooling(model.config.hidden_size, pooling_mode=pooling)
    return SentenceTransformer(modules=[transformer, pooled, Normalize()], device=str(model.device))


def side_by_side(
    model: PreTrainedModel,
    asks: Recipe,
    texts: list[str],
    *,
    pooling: str,
    sizes: Sequence[int],
    rounds: int,
) -> tuple[Turns[Any], int]:
    """Turns of sentence-transformers, ours, and ours from views; and the peer's best batch size."""
    other = peer(asks.model, model, pooling=pooling)
    best = best_batch(other, texts[: max(4, len(texts) // 8)], sizes)
    encoder = Encoder(Backbone(model, attention=asks.attention), asks)
    views = load_tokenizer(asks).views(texts)
    # All of them: the token budget is searched for in the first pass that is long enough.
    encoder.encode_views(views)
    turns = take_turns(
        {
            "peer": lambda: other.encode(texts, batch_size=best),
            "ours": lambda: encoder.encode(texts),
            "ours, from views": lambda: encoder.encode_views(views).embeddings,
        },
        rounds=rounds,
    )
    return turns, best


def best_batch(model: Any, few: list[str], sizes: Sequence[int]) -> int:
    """The batch size with which a sentence-transformers model is quickest, of those that fit."""
    return quickest(
        sizes,
        lambda size: model.encode(few, batch_size=size),
        beyond=(torch.OutOfMemoryError,),
    )


def matmul_flops(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> float:
    """FLOP/s of a plain square matrix product."""
    side, times = (256, 3) if tiny else (_MATMUL, 30)
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        one @ other
    with synchronized(device):
        started = time.perf_counter()
        for _ in range(times):
            one @ other
    return 2.0 * side**3 * times / (time.perf_counter() - started)


@contextmanager
def synchronized(device: torch.device) -> Iterator[None]:
    """Nothing is pending on the device when it is entered or left."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    yield
    wait()


def flops(model: PreTrainedModel, counts: Sequence[int], *, causal: bool) -> float:
    """FLOPs that texts of so many tokens need: linear layers of the blocks, and attention."""
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    squares = sum(float(count) ** 2 for count in counts)
    attention = 4.0 * config.num_attention_heads * head * config.num_hidden_layers * squares
    return 2.0 * linear * sum(counts) + attention * (0.5 if causal else 1.0)
