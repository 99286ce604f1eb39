"""Tiny untrained models of real classes: two layers, 32 wide, equal at every call."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from tests.fakes import tiny_tokenizer

SIZE = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}

DECODERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZE)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32)),
}
ENCODERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**SIZE)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZE)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZE)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(**SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZE, local_attention=4)),
    "t5": lambda: T5EncoderModel(
        T5Config(vocab_size=600, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
}
MODELS = {**DECODERS, **ENCODERS}
TOKENIZERS = {
    "gpt2": "gpt2",
    "neox": "gpt2",
    "opt": "gpt2",
    "qwen3": "qwen",
    "bert": "bert",
    "distilbert": "bert",
}


def model(name: str) -> PreTrainedModel:
    """The tiny model of that name."""
    torch.manual_seed(sum(map(ord, name)))
    return MODELS[name]().eval()


def tokenizer(name: str) -> Tokenizer:
    """A tokenizer of the kind that such a model has."""
    return tiny_tokenizer(TOKENIZERS.get(name, "llama"))


def save(name: str, directory: Path) -> Path:
    """The directory, with the model of that name and its tokenizer saved to it."""
    model(name).save_pretrained(directory)
    tokenizer(name).save(str(directory / "tokenizer.json"))
    return directory


# As chat models of the Qwen family write a conversation.
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_chat(directory: Path, *, template: str | None = CHAT, seed: int = 3) -> Path:
    """The directory, with a tiny language model, its tokenizer and its chat template.

    It was tuned on nothing, and says something random until it says <|im_end|>, which it likes to.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer("qwen")
    ends = tokenizer.token_to_id("<|im_end|>")
    sizes = {**GROUPED, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": ends}
    made = LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 4096}))
    with torch.no_grad():
        made.lm_head.weight[ends] *= 2
    made.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def config(name: str) -> PreTrainedConfig:
    """The config of the model of that name."""
    return model(name).config
