"""Linear layers and norms that are made of others: what they compute together stays the same."""

import torch
from torch import Tensor, nn


def biased(linear: nn.Linear, bias: Tensor | None) -> nn.Linear:
    """The same product with another bias."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = linear.weight
    if bias is not None:
        other.bias = nn.Parameter(bias, requires_grad=False)
    return other


def raised(norm: nn.LayerNorm, bias: Tensor) -> nn.LayerNorm:
    """The same norm with more bias."""
    other = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, device="meta")
    other.weight = norm.weight
    other.bias = nn.Parameter(norm.bias + bias, requires_grad=False)
    return other


def bias_in_a_column(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[nn.Linear, int]:
    """The same product without a bias, of what a norm gives with 1 in the column that is returned.

    Before the norm's weight and bias its numbers sum to zero, and so one of them is told by the
    others: the one of the smallest weight, for which no other counts more than before.
    """
    scale, shift, weight = norm.weight.double(), norm.bias.double(), linear.weight.double()
    spare = int(scale.abs().argmin())
    share = torch.where(scale == 0, 0, scale[spare] / scale)
    share[spare] = 0
    told = weight[:, spare]
    made = weight - told[:, None] * share
    made[:, spare] = linear.bias.double() + told * (shift[spare] + shift @ share)
    return _linear(made.float(), None), spare


def paired(linear: nn.Linear, width: int) -> nn.Linear:
    """The same product; in each head of this width the halves of its output alternate."""
    order = torch.arange(linear.out_features).view(-1, 2, width // 2).transpose(1, 2).flatten()
    bias: Tensor | None = linear.bias
    return _linear(linear.weight[order], None if bias is None else bias[order])


def joined(*parts: nn.Linear) -> nn.Linear:
    """One product whose output is that of all parts, end to end."""
    bias = None
    if any(part.bias is not None for part in parts):
        each = (
            part.weight.new_zeros(part.out_features) if part.bias is None else part.bias
            for part in parts
        )
        bias = torch.cat([*each])
    return _linear(torch.cat([part.weight for part in parts]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return biased(linear, bias)
