"""Every method on a tiny untrained model of its architecture, with a tokenizer of its family."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralModel,
    OlmoeConfig,
    OlmoeModel,
    OPTConfig,
    OPTModel,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedjob.config.interventions import slotted
from embedjob.config.job_file import JobSource, Layer
from embedjob.config.recipe import Recipe, Role
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.batching.padding import Side
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.job.resolve import layer_recipes
from embedjob.text.slots import as_normalized
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.vectors.encoded import Encoded
from tests.fakes import tiny_tokenizer
from tests.methods.references import LatentAttentionModel

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
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_T5 = {"vocab_size": 640, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def _with(layer: torch.nn.Module, host: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with a layer that no class of transformers has, under its published name."""
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    host.add_module(name, layer.requires_grad_(False))
    return host


_MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**_SIZE)),
    "xlmr": lambda: XLMRobertaModel(XLMRobertaConfig(**_SIZE)),
    "llama": lambda: LlamaModel(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralModel(MistralConfig(**_GROUPED, sliding_window=None)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**_GROUPED)),
    "llama_lm": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "bert_lm": lambda: BertForMaskedLM(BertConfig(**_SIZE)),
    "olmoe": lambda: OlmoeModel(OlmoeConfig(**_GROUPED, **_EXPERTS)),
    "qwen_moe": lambda: Qwen2MoeModel(
        Qwen2MoeConfig(
            **_GROUPED,
            **_EXPERTS,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            mlp_only_layers=[1],
        )
    ),
    "nvembed": lambda: _with(
        LatentAttentionModel(32, latents=6, heads=3, dim_head=16),
        MistralModel(MistralConfig(**_GROUPED, sliding_window=None)),
        "latent_attention_model",
    ),
    "t5": lambda: _with(
        torch.nn.Linear(32, 24, bias=False), T5EncoderModel(T5Config(**_T5)), "dense"
    ),
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
        """What the method's file and these knobs make in the role, on a CPU."""
        return self.recipes(**more)[self.role]

    def recipes(self, **more: Any) -> Mapping[Role, Recipe]:
        """What they make in every role."""
        place = folder(self.model) if self.model in _FOLDERS else "-"
        encoder = {"method": self.method, "model": place, **self.knobs, **more}
        job = {"encoder": encoder, "pool": {"gpus_per_actor": 0}}
        recipes = layer_recipes(JobSource((Layer("job", job),)), {}).recipes
        slots = any(slotted(recipe.interventions) for recipe in recipes.values())
        if not slots or self.family == "-":
            return recipes
        tokenizer = self.tokenizer()
        return {role: as_normalized(recipe, tokenizer) for role, recipe in recipes.items()}

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
            _loaded(recipe) if self.model in _FOLDERS else _backbone(self.model, recipe.attention),
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
    if not name.endswith("_lm"):
        return Backbone(model(name), attention=attention)
    head = LanguageHead(model(name))
    return Backbone(head.body, attention=attention, head=head)


@cache
def _loaded_from(place: str, recipe_json: str) -> Backbone:
    return load_backbone(Recipe.model_validate_json(recipe_json), device=torch.device("cpu"))


def _loaded(recipe: Recipe) -> Backbone:
    kept = {"model": recipe.model, "dtype": "float32", "attention": recipe.attention}
    kept |= {"pooling": recipe.pooling}
    return _loaded_from(recipe.model, Recipe.model_validate(kept).model_dump_json())


@cache
def folder(name: str) -> str:
    """The directory of a model whose methods read more than the transformer, as published."""
    directory = Path(_PLACES.name) / name
    directory.mkdir()
    _FOLDERS[name](model(name), directory)
    return str(directory)


def _nvembed(whole: PreTrainedModel, directory: Path) -> None:
    """The names and the config of nvidia/NV-Embed-v2, whose own sizes are its code's defaults."""
    config = {
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "model_type": "nvembed",
        "hidden_size": 32,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": 6,
            "num_cross_heads": 3,
            "hidden_dim": 32,
            "latent_dim": 32,
            "cross_dim_head": 16,
        },
        "text_config": {
            **whole.config.to_dict(),
            "model_type": "bidir_mistral",
            "sliding_window": 4,
            "bad_words_ids": None,
            "max_length": 20,
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name if name.startswith("latent_attention_model.") else f"embedding_model.{name}": tensor
        for name, tensor in whole.state_dict().items()
    }
    half = len(tensors) // 2
    parts = {1: list(tensors)[:half], 2: list(tensors)[half:]}
    files = {n: f"model-0000{n}-of-00002.safetensors" for n in parts}
    for number, names in parts.items():
        kept = {name: tensors[name].contiguous() for name in names}
        save_file(kept, directory / files[number], metadata={"format": "pt"})
    index = {name: files[number] for number, names in parts.items() for name in names}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)


def _t5_and_dense(whole: PreTrainedModel, directory: Path) -> None:
    """The layout of hkunlp/instructor-large: a transformer, and a Dense without bias."""
    dense = whole.get_submodule("dense")
    del whole.dense
    whole.save_pretrained(directory)
    (directory / "2_Dense").mkdir()
    save_file({"linear.weight": dense.weight}, directory / "2_Dense/model.safetensors")
    config = {
        "in_features": 32,
        "out_features": 24,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (directory / "2_Dense/config.json").write_text(json.dumps(config))


_PLACES = tempfile.TemporaryDirectory()
_FOLDERS: Mapping[str, Callable[[PreTrainedModel, Path], None]] = {
    "nvembed": _nvembed,
    "t5": _t5_and_dense,
}
