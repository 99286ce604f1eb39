"""LoRA adapters of the tiny Llama, written tensor by tensor as published ones are, without PEFT."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, KEYS, LAYERS, RANK = 32, 16, 2, 4
# In the model without a head, and in one with: PEFT names what it wraps.
BARE, INSIDE = "base_model.model.", "base_model.model.model."
_WIDTHS = {"q_proj": HIDDEN, "v_proj": KEYS}
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": ["q_proj", "v_proj"],
    "inference_mode": True,
}


def factors(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The A [RANK, in] and B [out, RANK] of each target, by its name in the bare model."""
    made = torch.Generator().manual_seed(seed)
    return {
        f"layers.{layer}.self_attn.{target}": (
            torch.randn(RANK, HIDDEN, generator=made) * 0.3,
            torch.randn(width, RANK, generator=made) * 0.3,
        )
        for layer in range(LAYERS)
        for target, width in _WIDTHS.items()
    }


def deltas(seed: int, scale: float = 2.0) -> dict[str, Tensor]:
    """What the adapter adds to each weight: alpha / r times B A."""
    return {f"{name}.weight": scale * (b @ a) for name, (a, b) in factors(seed).items()}


def save_adapter(
    to: Path,
    seed: int,
    *,
    prefix: str = BARE,
    more: dict[str, Tensor] | None = None,
    **changes: Any,
) -> Path:
    """The directory, with the adapter of that seed; `changes` are of its config."""
    to.mkdir(parents=True, exist_ok=True)
    tensors = dict(more or {})
    for name, (a, b) in factors(seed).items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a
        tensors[f"{prefix}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    (to / "adapter_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    return to
