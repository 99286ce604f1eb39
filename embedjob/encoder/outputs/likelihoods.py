"""Likelihoods of continuations: one mean log-probability per view.

Legend: V views, R rows, T tokens, N tokens of all spans, U states, D width, W vocabulary.
"""

import torch
from torch import Tensor

from embedjob.encoder.batching.transfers import to_device
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.encoder.outputs.view_states import ViewStates


def log_probabilities(head: LanguageHead, states: ViewStates) -> Tensor:
    """Return the mean log-probability [V, 1] of the tokens of each span after its first token.

    Spans have two tokens or more. In a tree, a span's first token may stand apart from the others,
    and several spans may have it, whose state goes through the head once. No device is waited for.
    """
    span_VT, hidden_RTD = states.span_VT, states.hidden_VTD
    device, tokens = hidden_RTD.device, span_VT.shape[1]
    owner_N, all_N = span_VT.nonzero().unbind(dim=1)
    followed_N = owner_N[:-1] == owner_N[1:]
    owner_N, place_N, next_N = (
        one_N[followed_N] for one_N in (owner_N[:-1], all_N[:-1], all_N[1:])
    )
    row_N = owner_N if states.row_V is None else states.row_V[owner_N]
    # Sorted by state: a block of states has the ids after them side by side, and its logits once.
    state_N = row_N * tokens + place_N
    order_N = state_N.argsort(stable=True)
    state_U, which_N, count_U = state_N[order_N].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    next_N = states.ids_VT[row_N, next_N][order_N]
    states_UD = hidden_RTD.flatten(0, 1)[to_device(state_U, device)]
    most = head.most_states(device)
    sizes = [int(count_u.sum()) for count_u in count_U.split(most)]
    blocks = zip(states_UD.split(most), which_N.split(sizes), next_N.split(sizes), strict=True)
    found_N = torch.cat(
        [
            _scored(head, states_uD, to_device(which_n % most, device), to_device(next_n, device))
            for states_uD, which_n, next_n in blocks
        ]
    )
    sum_V = torch.zeros(len(span_VT), device=device)
    sum_V.index_add_(0, to_device(owner_N[order_N], device), found_N)
    count_V = torch.bincount(owner_N, minlength=len(span_VT))
    return (sum_V / to_device(count_V, device))[:, None]


def _scored(head: LanguageHead, states_UD: Tensor, which_N: Tensor, next_N: Tensor) -> Tensor:
    """Return the log-probabilities of ids [N], each after one of the states."""
    return head.logits(states_UD).log_softmax(dim=1)[which_N, next_N]
