"""Likelihoods of continuations: one mean log-probability per view.

Legend: V views, T tokens, N tokens of all spans, D width, W vocabulary.
"""

import torch
from torch import Tensor

from embedjob.encoder.batching.transfers import to_device
from embedjob.encoder.outputs.language_model import LanguageHead


def log_probabilities(
    head: LanguageHead, hidden_VTD: Tensor, span_VT: Tensor, ids_VT: Tensor
) -> Tensor:
    """Return the mean log-probability [V, 1] of the tokens of each span after its first token.

    Spans have two tokens or more. They and the ids are on the host, so no device is waited for.
    """
    owner_N, place_N = (span_VT[:, :-1] & span_VT[:, 1:]).nonzero().unbind(dim=1)
    device = hidden_VTD.device
    next_N1 = to_device(ids_VT[owner_N, place_N + 1], device)[:, None]
    owner_N, place_N = to_device(owner_N, device), to_device(place_N, device)
    states_ND = hidden_VTD[owner_N, place_N]
    most = head.most_states(device)
    found_N = torch.cat(
        [
            logits_NW.gather(1, part_N1)[:, 0] - logits_NW.logsumexp(dim=1)
            for logits_NW, part_N1 in zip(
                map(head.logits, states_ND.split(most)), next_N1.split(most), strict=True
            )
        ]
    )
    sum_V = torch.zeros(len(span_VT), device=device).index_add_(0, owner_N, found_N)
    count_V = torch.zeros_like(sum_V).index_add_(0, owner_N, torch.ones_like(found_N))
    return (sum_V / count_V)[:, None]
