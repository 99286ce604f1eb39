"""A model's blocks in one piece, in forms that take fewer passes over memory on a CPU.

Each is made for one architecture, and taken, as those in `forms.py`, for all blocks whose parts
read like that one's.

Legend: V views, T tokens, D width, H heads of queries, keys and values, E head width.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from embedjob.encoder.cpu.layers import (
    Gated,
    bias_in_a_column,
    biased,
    child,
    code_of,
    interleave_rope_halves,
    joined,
    require_reads_like,
    with_added_bias,
)


class PostNorm(nn.Module):
    """A block of BERT in one piece, its attention with one product, its wide states soon gone.

    Biases cost a pass each, and but for two they are put elsewhere. Keys need none: it would add as
    much to every score of a query, which softmax takes away. That of values would be in every
    weighted mean, and goes into the next product's; that of the last product into the first
    norm's, to which it is added; and that of the product between stands in for one of its weights.
    """

    def __init__(self, block: Any) -> None:
        """Takes the block's own layers; TypeError if it does not read like BERT's."""
        super().__init__()
        for name, kind in _PARTS_OF_BERT.items():
            require_reads_like(block.get_submodule(name), kind)
        own, output = block.attention.self, block.attention.output
        if block.is_decoder:
            raise TypeError("a decoder's block may be given what was kept of other tokens")
        self.config: PreTrainedConfig = own.config
        self.is_causal, self.scaling = bool(own.is_causal), float(own.scaling)
        self.width = int(own.attention_head_size)
        query, key, value = (child(own, name, nn.Linear) for name in ("query", "key", "value"))
        self.heads = [layer.out_features // self.width for layer in (query, key, value)]
        self.qkv = joined(*(biased(layer, None) for layer in (query, key, value)))
        self.query_bias: nn.Parameter = query.bias
        mixed = child(output, "dense", nn.Linear)
        self.mixed = biased(mixed, mixed(value.bias))
        up, down = (child(part, "dense", nn.Linear) for part in (block.intermediate, block.output))
        self.inner_norm = with_added_bias(child(output, "LayerNorm", nn.LayerNorm), down.bias)
        up = biased(up, up.bias - up.weight @ down.bias)
        self.up, self.spare = bias_in_a_column(up, self.inner_norm)
        self.down = biased(down, None)
        self.norm = child(block.output, "LayerNorm", nn.LayerNorm)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **asked: Any
    ) -> Tensor:
        """The block's output [V, T, D]."""
        rows = hidden_states.flatten(0, 1)
        states_VTHE = self.qkv(rows).view(*hidden_states.shape[:2], -1, self.width)
        states_VTHE.narrow(2, 0, self.heads[0]).add_(self.query_bias.view(-1, self.width))
        query, key, value = states_VTHE.transpose(1, 2).split(self.heads, dim=1)
        attend = AttentionInterface()[self.config._attn_implementation]
        means = attend(self, query, key, value, attention_mask, scaling=self.scaling, **asked)[0]
        # Layers are not called as such: between products each call finds its code out of the cache.
        mixed = (rows + self.mixed.bias).addmm_(means.reshape(rows.shape), self.mixed.weight.t())
        attended = _layer_norm(mixed, self.inner_norm)
        # What follows finds the memory of what is gone, which is still at hand.
        del states_VTHE, query, key, value, means, mixed
        spare = attended.select(1, self.spare)
        kept = spare.clone()
        spare.fill_(1)
        wide: Tensor = torch.ops.aten.gelu_(torch.mm(attended, self.up.weight.t()))
        spare.copy_(kept)
        attended.addmm_(wide, self.down.weight.t())
        del wide
        return _layer_norm(attended, self.norm).view(hidden_states.shape)


class PreNorm(nn.Module):
    """A block of Llama in one piece: both its sums are made in what attention gave."""

    def __init__(self, block: Any) -> None:
        """Takes the block's own layers; TypeError if it does not read like Llama's."""
        super().__init__()
        require_reads_like(block, LlamaDecoderLayer)
        # What a model may ask its block, such as the kind of its attention; not the forward that
        # accelerate's hooks put there, which would be the block's own.
        vars(self).update(
            (name, one)
            for name, one in vars(block).items()
            if not name.startswith("_") and not callable(one)
        )
        self.input_layernorm: nn.Module = block.input_layernorm
        self.self_attn: nn.Module = block.self_attn
        self.post_attention_layernorm: nn.Module = block.post_attention_layernorm
        self.mlp = Gated(block.mlp)

    def forward(self, hidden_states: Tensor, **asked: Any) -> Tensor:
        """The block's output [V, T, D]."""
        attended: Tensor
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **asked)
        # What came in may be kept by who reads this layer; what attention gave is the block's own.
        attended.add_(hidden_states)
        out: Tensor = self.mlp(self.post_attention_layernorm(attended), attended)
        return out


class Rotary(nn.Module):
    """Llama's attention with one product, in whose output queries and keys are turned.

    The two numbers that a position turns lie side by side in it, as one complex number: rows of
    both weights change their places alike, and scores stay what they are.
    """

    def __init__(self, attention: Any) -> None:
        """Takes the attention's own layers; TypeError if it does not read like one of Llama's."""
        super().__init__()
        window = _WINDOWS.get(code_of(type(attention)))
        if window is None:
            raise TypeError(f"a {type(attention).__name__} is not the attention of Llama")
        self.config: PreTrainedConfig = attention.config
        self.is_causal, self.scaling = bool(attention.is_causal), float(attention.scaling)
        self.layer_idx = int(attention.layer_idx)
        self.num_key_value_groups = int(attention.num_key_value_groups)
        self.sliding_window = window(attention)
        self.width = int(attention.head_dim)
        query, key, value = (child(attention, f"{name}_proj", nn.Linear) for name in "qkv")
        self.heads = [layer.out_features // self.width for layer in (query, key, value)]
        self.qkv_proj = joined(
            interleave_rope_halves(query, self.width),
            interleave_rope_halves(key, self.width),
            value,
        )
        self.o_proj = child(attention, "o_proj", nn.Linear)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **asked: Any,
    ) -> tuple[Tensor, Any]:
        """The attention's output [V, T, D], and what the attention function says beside it."""
        half = self.width // 2
        cos, sin = (states[..., None, :half] for states in position_embeddings)
        tokens = hidden_states.shape[:-1]
        states_VTHE = self.qkv_proj(hidden_states).view(*tokens, -1, self.width)
        turned = states_VTHE[..., : sum(self.heads[:2]), :].unflatten(-1, (half, 2))
        torch.view_as_complex(turned).mul_(torch.complex(cos, sin))
        query, key, value = states_VTHE.transpose(1, 2).split(self.heads, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = AttentionInterface()[self.config._attn_implementation]
        asked |= {"scaling": self.scaling, "sliding_window": self.sliding_window}
        means, more = attend(self, query, key, value, attention_mask, **asked)
        return self.o_proj(means.reshape(*tokens, -1)), more


def _layer_norm(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


# A block, under no name, and its parts.
_PARTS_OF_BERT: Mapping[str, type[nn.Module]] = {
    "": BertLayer,
    "attention": BertAttention,
    "attention.self": BertSelfAttention,
    "attention.output": BertSelfOutput,
    "intermediate": BertIntermediate,
    "output": BertOutput,
}
# The attention that reads like one of these, and over how many tokens it looks back.
_WINDOWS: Mapping[tuple[Any, ...], Callable[[Any], int | None]] = {
    code_of(LlamaAttention): lambda attention: None,
    code_of(MistralAttention): lambda attention: getattr(attention.config, "sliding_window", None),
    code_of(Qwen2Attention): attrgetter("sliding_window"),
}
