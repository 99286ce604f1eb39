"""Pooling by latent attention, from its published mathematics (NV-Embed, arXiv 2405.17428).

Every token attends to a dictionary of learned vectors, passes a gated feed-forward layer, both with
a residual, and the span's tokens are averaged.

Legend: V views, T tokens, N tokens of all spans, D width, L latents, H heads, E width of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.weight_files import prefixed_tensors
from embedjob.errors import ModelError
from embedjob.models import nvembed
from embedjob.models.architecture import config_of
from embedjob.models.components import components_of
from embedjob.models.nvembed import LatentSizes
from embedjob.models.source import materialize, transformer_directory
from embedjob.vectors.poolers import mean

_ATTEND, _FEED = "cross_attend_blocks.0.", "cross_attend_blocks.1."
_WIDEN = 4
# Inside, a token is eight times as wide: all tokens at once would not fit beside a model.
_TOKENS_AT_ONCE = 4096


class LatentAttention:
    """The latent attention layer of a checkpoint; it computes in the type of its input."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sizes: LatentSizes,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Read the published tensors; ModelError unless all are there, of these sizes.

        The latents are the same for every text: their keys and values are made once, in float32.
        """
        _require(tensors, sizes)
        self._heads = sizes.num_cross_heads
        spent = ("latents", f"{_ATTEND}norm_context", f"{_ATTEND}fn.to_kv")
        parts = {n: tensor.to(device) for n, tensor in tensors.items() if n.startswith(spent)}
        context_LD = _normed(parts["latents"].float(), parts, f"{_ATTEND}norm_context")
        both = linear(context_LD, parts[f"{_ATTEND}fn.to_kv.weight"].float()).chunk(2, dim=-1)
        self._keys_HLE, self._values_HLE = (self._by_head(one).contiguous() for one in both)
        self._weights = {n: one.to(device, dtype) for n, one in tensors.items() if n not in parts}

    def __call__(self, hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
        """Return the mean over each span of the layer's output, in float32 [V, D]."""
        blocks = hidden_VTD[mask_VT].split(_TOKENS_AT_ONCE)
        moved_VTD = torch.zeros_like(hidden_VTD, dtype=torch.float32)
        moved_VTD[mask_VT] = torch.cat([self._moved(states_ND) for states_ND in blocks])
        return mean(moved_VTD, mask_VT)

    def _moved(self, states_ND: Tensor) -> Tensor:
        dtype, states_ND = states_ND.dtype, states_ND.float()
        normed_ND = _normed(states_ND, self._weights, f"{_ATTEND}norm").to(dtype)
        query_HNE = self._by_head(self._linear(normed_ND, f"{_ATTEND}fn.to_q"))
        attended_HNE = scaled_dot_product_attention(
            query_HNE[None], self._keys_HLE.to(dtype)[None], self._values_HLE.to(dtype)[None]
        )[0]
        attended_ND = attended_HNE.transpose(0, 1).flatten(start_dim=1)
        states_ND = states_ND + self._linear(attended_ND, f"{_ATTEND}fn.to_out").float()
        normed_ND = _normed(states_ND, self._weights, f"{_FEED}norm").to(dtype)
        value, gate = self._linear(normed_ND, f"{_FEED}fn.net.0").chunk(2, dim=-1)
        return states_ND + self._linear(value * gelu(gate), f"{_FEED}fn.net.2").float()

    def _linear(self, states: Tensor, name: str) -> Tensor:
        bias = self._weights.get(f"{name}.bias")
        weight = self._weights[f"{name}.weight"].to(states.dtype)
        return linear(states, weight, None if bias is None else bias.to(states.dtype))

    def _by_head(self, states: Tensor) -> Tensor:
        """Return rows of concatenated heads as rows of each head [H, rows, E]."""
        by_head: Tensor = states.unflatten(-1, (self._heads, -1)).transpose(0, 1)
        return by_head


def load_latent_attention(backbone: Backbone, recipe: Recipe) -> LatentAttention:
    """Load the layer of the recipe's checkpoint; ModelError if it has none."""
    directory = transformer_directory(materialize(components_of(recipe).weights))
    config = config_of(directory)
    if not nvembed.is_nvembed(config):
        raise ModelError(
            f"encoder.pooling: got latent_attention, but {recipe.model} has no such layer, which"
            " NV-Embed's checkpoints have; allowed is another pooling"
        )
    prefix = nvembed.LATENT_PREFIX
    tensors = prefixed_tensors(directory, prefix, allow_pickle=recipe.allow_pickle)
    sizes, dtype = nvembed.latent_sizes(config), backbone.model.dtype
    return LatentAttention(tensors, sizes, device=backbone.device, dtype=dtype)


def _normed(states: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    weight, bias = (weights[f"{name}.{part}"].float() for part in ("weight", "bias"))
    return layer_norm(states, weight.shape, weight, bias)


def _require(tensors: Mapping[str, Tensor], sizes: LatentSizes) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = _shapes(sizes)
    differ = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
    if differ:
        got, allowed = shapes.get(differ[0]), wanted.get(differ[0])
        raise ModelError(
            "encoder.pooling: latent_attention: the checkpoint's tensors do not fit its"
            f" config.json: {differ[0]} is {got}, and should be {allowed}"
            f" ({len(differ)} of them differ); was it saved whole?"
        )


def _shapes(sizes: LatentSizes) -> dict[str, tuple[int, ...]]:
    width, inner = sizes.latent_dim, sizes.num_cross_heads * sizes.cross_dim_head
    norms = {
        f"{name}.{part}": (size,)
        for name, size in (
            (f"{_ATTEND}norm", width),
            (f"{_ATTEND}norm_context", sizes.hidden_dim),
            (f"{_FEED}norm", width),
        )
        for part in ("weight", "bias")
    }
    return {
        **norms,
        "latents": (sizes.num_latents_value, width),
        f"{_ATTEND}fn.to_q.weight": (inner, width),
        f"{_ATTEND}fn.to_kv.weight": (2 * inner, sizes.hidden_dim),
        f"{_ATTEND}fn.to_out.weight": (width, inner),
        f"{_FEED}fn.net.0.weight": (2 * _WIDEN * width, width),
        f"{_FEED}fn.net.0.bias": (2 * _WIDEN * width,),
        f"{_FEED}fn.net.2.weight": (width, _WIDEN * width),
        f"{_FEED}fn.net.2.bias": (width,),
    }
