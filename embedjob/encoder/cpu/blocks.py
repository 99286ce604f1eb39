"""Fused transformer blocks for a CPU: a post-norm block, a pre-norm block, rotary attention.

Each is written after one architecture, and replaces every block whose parts have the same pinned
forwards (`pinned.py`).

Legend: V views, T tokens, D width, H heads of queries, keys and values, E head width.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig

from embedjob.encoder.cpu.layers import (
    SwiGlu,
    bias_in_a_column,
    biased,
    child,
    interleave_rope_halves,
    joined_linear,
    with_added_bias,
)
from embedjob.encoder.cpu.pinned import check_reads_like, reads_like


class PostNormBlock(nn.Module):
    """A block of BERT, with one product for queries, keys and values, and few biases.

    Each bias costs a pass over memory; all but two are moved into other weights. The bias of keys
    adds the same number to all scores of a query, and softmax removes it. The bias of values is in
    every weighted mean, so it moves into the bias of the next product. The bias of the last product
    moves into the bias of the first norm, whose output that product is added to. The bias of the
    product between takes the place of one weight column.
    """

    def __init__(self, block: Any) -> None:
        """Take the block's own layers; TypeError if their forwards are not BERT's."""
        super().__init__()
        for name, kind in _PARTS_OF_BERT.items():
            check_reads_like(block.get_submodule(name), kind)
        own, output = block.attention.self, block.attention.output
        if block.is_decoder:
            raise TypeError("a decoder's block may be given a cache of earlier tokens")
        self.config: PreTrainedConfig = own.config
        self.is_causal, self.scaling = bool(own.is_causal), float(own.scaling)
        self.width = int(own.attention_head_size)
        query, key, value = (child(own, name, nn.Linear) for name in ("query", "key", "value"))
        self.heads = [layer.out_features // self.width for layer in (query, key, value)]
        self.qkv = joined_linear(*(biased(layer, None) for layer in (query, key, value)))
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
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **options: Any
    ) -> Tensor:
        """Return the block's output [V, T, D]."""
        rows = hidden_states.flatten(0, 1)
        states_VTHE = self.qkv(rows).view(*hidden_states.shape[:2], -1, self.width)
        states_VTHE.narrow(2, 0, self.heads[0]).add_(self.query_bias.view(-1, self.width))
        query, key, value = states_VTHE.transpose(1, 2).split(self.heads, dim=1)
        attend = AttentionInterface()[self.config._attn_implementation]
        means = attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)[0]
        # The layers' weights are used directly: after a large product, the Python code of a call is
        # no longer in the processor's cache.
        mixed = (rows + self.mixed.bias).addmm_(means.reshape(rows.shape), self.mixed.weight.t())
        attended = _layer_norm(mixed, self.inner_norm)
        # Freed before the wide states are made, so that they take memory that is still cached.
        del states_VTHE, query, key, value, means, mixed
        spare = attended.select(1, self.spare)
        kept = spare.clone()
        spare.fill_(1)
        wide: Tensor = torch.ops.aten.gelu_(torch.mm(attended, self.up.weight.t()))
        spare.copy_(kept)
        attended.addmm_(wide, self.down.weight.t())
        del wide
        return _layer_norm(attended, self.norm).view(hidden_states.shape)


class PreNormBlock(nn.Module):
    """A block of Llama, with both residual sums made in place in the attention's output."""

    def __init__(self, block: Any) -> None:
        """Take the block's own layers; TypeError if its forward is not Llama's."""
        super().__init__()
        check_reads_like(block, "LlamaDecoderLayer")
        # Attributes that a model reads from its blocks, such as the kind of attention; but not the
        # forward that accelerate's hooks set on a block, which would run the old block.
        vars(self).update(
            (name, value)
            for name, value in vars(block).items()
            if not name.startswith("_") and not callable(value)
        )
        self.input_layernorm: nn.Module = block.input_layernorm
        self.self_attn: nn.Module = block.self_attn
        self.post_attention_layernorm: nn.Module = block.post_attention_layernorm
        self.mlp = SwiGlu(block.mlp)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """Return the block's output [V, T, D]."""
        attended: Tensor
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        # A hook may keep the block's input, so only the attention's output is changed in place.
        attended.add_(hidden_states)
        out: Tensor = self.mlp(self.post_attention_layernorm(attended), attended)
        return out


class RotaryAttention(nn.Module):
    """Llama's attention, with one product for queries, keys and values, rotated in place.

    The two numbers of a rotary pair lie side by side, as one complex number. The rows of the query
    and key weights are permuted alike for this, so the scores do not change.
    """

    def __init__(self, attention: Any) -> None:
        """Take the attention's own layers; TypeError if its forward is not in the table below."""
        super().__init__()
        check_reads_like(attention, *_WINDOWS)
        window = next(_WINDOWS[name] for name in _WINDOWS if reads_like(type(attention), name))
        self.config: PreTrainedConfig = attention.config
        self.is_causal, self.scaling = bool(attention.is_causal), float(attention.scaling)
        self.layer_idx = int(attention.layer_idx)
        self.num_key_value_groups = int(attention.num_key_value_groups)
        self.sliding_window = window(attention)
        self.width = int(attention.head_dim)
        query, key, value = (child(attention, f"{name}_proj", nn.Linear) for name in "qkv")
        self.heads = [layer.out_features // self.width for layer in (query, key, value)]
        self.qkv_proj = joined_linear(
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
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """Return the output [V, T, D] and the second value of the attention function."""
        half = self.width // 2
        cos, sin = (states[..., None, :half] for states in position_embeddings)
        tokens = hidden_states.shape[:-1]
        states_VTHE = self.qkv_proj(hidden_states).view(*tokens, -1, self.width)
        pairs = states_VTHE[..., : sum(self.heads[:2]), :].unflatten(-1, (half, 2))
        torch.view_as_complex(pairs).mul_(torch.complex(cos, sin))
        query, key, value = states_VTHE.transpose(1, 2).split(self.heads, dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = AttentionInterface()[self.config._attn_implementation]
        options |= {"scaling": self.scaling, "sliding_window": self.sliding_window}
        means, rest = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(means.reshape(*tokens, -1)), rest


def _layer_norm(states: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


# Path of a part below the block ("" is the block itself), and its class.
_PARTS_OF_BERT: Mapping[str, str] = {
    "": "BertLayer",
    "attention": "BertAttention",
    "attention.self": "BertSelfAttention",
    "attention.output": "BertSelfOutput",
    "intermediate": "BertIntermediate",
    "output": "BertOutput",
}
# Class of the attention, and how its sliding window is read: in tokens, None for no window.
_WINDOWS: Mapping[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda attention: None,
    "MistralAttention": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2Attention": attrgetter("sliding_window"),
}
