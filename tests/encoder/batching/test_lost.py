"""A lost device, wherever in an encoder it is found to be so.

Covers: embedjob.encoder.batching.scheduler
"""

from typing import Any

import pytest
import torch

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.errors import DeviceLostError
from tests.encoder import tiny
from tests.encoder.plain import recipe
from tests.encoder.token_views import shared_views

SAID = "CUDA error: an illegal memory access was encountered"


def lost(*_: Any) -> None:
    raise torch.AcceleratorError(SAID)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(Backbone(tiny.model("llama").base_model, attention="causal"), recipe())


@pytest.mark.parametrize("forwards", range(6))
def test_at_whichever_forward_a_device_is_lost_its_encoder_says_so(
    encoder: Encoder, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them are not of views: they try whether a shared prefix may be run once."""
    left = [forwards]

    def lose(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
            monkeypatch.setattr(torch.cuda, "synchronize", lost)
            lost()

    encoder.backbone.model.register_forward_pre_hook(lose)
    with pytest.raises(DeviceLostError, match=f"its process must end: {SAID}"):
        encoder.encode_views(shared_views())


def test_what_a_sound_device_raises_stays_what_it_is(encoder: Encoder) -> None:
    encoder.backbone.model.register_forward_pre_hook(lost)
    with pytest.raises(torch.AcceleratorError, match=SAID):
        encoder.encode_views(shared_views())
