"""Every method on a tiny untrained model of its architecture, with a tokenizer of its family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    OPTConfig,
    OPTModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batches import Side
from embedjob.encoder.encoder import Encoder
from embedjob.jobfile import Draft, Layer
from embedjob.methods.resolution import resolve
from embedjob.recipe import Recipe, Role
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.vectors.encoded import Encoded
from tests.fakes import tiny_tokenizer

EOS = 2
_SIZE = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2100,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2, "head_dim": 8}
_MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**_SIZE)),
    "xlmr": lambda: XLMRobertaModel(XLMRobertaConfig(**_SIZE)),
    "llama": lambda: LlamaModel(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralModel(MistralConfig(**_GROUPED, sliding_window=None)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**_GROUPED)),
    "opt": lambda: OPTModel(OPTConfig(**_SIZE, ffn_dim=64, word_embed_proj_dim=32)),
}


@dataclass(frozen=True)
class Setting:
    """A method in a role, on a tiny model and a tokenizer of a family with these tokens more."""

    method: str
    role: Role
    model: str
    family: str
    tokens: tuple[str, ...] = ()
    ends: bool = False
    knobs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.method}-{self.role}-{self.family}"

    def recipe(self, **more: Any) -> Recipe:
        """What the method's file and these knobs make, on a CPU."""
        encoder = {"method": self.method, "model": "-", **self.knobs, **more}
        job = {
            "input": {"path": "in", "text": "body"},
            "encoder": encoder,
            "pool": {"gpus_per_actor": 0},
            "output": {"path": "out"},
        }
        return resolve(Draft((Layer("job", job),)), {}).recipes[self.role]

    def with_knobs(self, **more: Any) -> "Setting":
        """The same method with these knobs over its own."""
        return replace(self, knobs={**self.knobs, **more})

    def tokenizer(self) -> Tokenizer:
        """A fresh tokenizer; one that `ends` puts its EOS last by itself."""
        tokenizer = tiny_tokenizer(self.family)
        tokenizer.add_special_tokens(list(self.tokens))
        if self.ends:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>",
                special_tokens=[(one, tokenizer.token_to_id(one)) for one in ("<s>", "</s>")],
            )
        return tokenizer

    def views(self, **more: Any) -> ViewTokenizer:
        """Our tokenizer under the method's recipe."""
        return ViewTokenizer(self.tokenizer(), self.recipe(**more), eos_id=EOS)

    def encode(
        self, views: ViewTokenizer, texts: list[str], *, side: Side = "right", budget: int = 9999
    ) -> Encoded:
        """Our embeddings."""
        recipe = self.recipe()
        encoder = Encoder(
            _backbone(self.model, recipe.attention),
            recipe,
            padding_side=side,
            tokens_per_microbatch=budget,
        )
        return encoder.encode_views(views.views(texts))


def model(name: str) -> PreTrainedModel:
    """A fresh model of that name, equal at every call."""
    torch.manual_seed(sum(map(ord, name)))
    return _MODELS[name]().eval()


@cache
def _backbone(name: str, attention: Any) -> Backbone:
    return Backbone(model(name), attention=attention)
