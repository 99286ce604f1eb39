"""Pinned forwards: where transformers has others, or a CPU's layers fail, a model keeps its own."""

import copy
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, optimize_for_cpu
from embedjob.encoder.cpu.pinned import PINNED, digest_of
from embedjob.encoder.encoder import Encoder
from tests.encoder import tiny
from tests.encoder.plain import same

HOMES = ("bert", "llama", "mistral", "qwen2", "t5")
Forward = Callable[..., torch.Tensor]


def _bert_intermediate(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Another wording of the same layer."""
    wide = self.dense(hidden_states)  # type: ignore[operator]
    return self.intermediate_act_fn(wide)  # type: ignore[operator]


def _llama_mlp(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate = self.act_fn(self.gate_proj(x))  # type: ignore[operator]
    return self.down_proj(gate * self.up_proj(x))  # type: ignore[operator]


def test_the_installed_transformers_has_the_pinned_forwards() -> None:
    version = ".".join(transformers.__version__.split(".")[:2])
    if version not in PINNED:
        pytest.skip(f"transformers {version} is not pinned")
    homes = [import_module(f"transformers.models.{name}.modeling_{name}") for name in HOMES]
    for name, digest in PINNED[version].items():
        kind = next(getattr(home, name) for home in homes if hasattr(home, name))
        assert digest_of(kind) == digest, name


def test_comments_and_annotations_are_not_part_of_a_digest_and_defaults_are() -> None:
    class One(torch.nn.Module):
        def forward(self, states: torch.Tensor, more: int = 1) -> torch.Tensor:
            """Say something."""
            return states + more

    class Commented(torch.nn.Module):
        def forward(self, states, more=1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - the point of the test
            # Say something else.
            return states + more

    class Other(torch.nn.Module):
        def forward(self, states: torch.Tensor, more: int = 2) -> torch.Tensor:
            return states + more

    class Outside(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            if states.ndim > 2:
                states = states + 1
            return states

    class Inside(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            if states.ndim > 2:
                states = states + 1
                return states

    assert digest_of(One) == digest_of(Commented) != digest_of(Other)
    assert digest_of(Outside) != digest_of(Inside)
    assert digest_of(torch.nn.Identity) not in {"", digest_of(One)}


def test_a_forward_without_source_has_no_digest() -> None:
    space: dict[str, Forward] = {}
    exec("def forward(self, states): return states", space)
    kind = type("Made", (torch.nn.Module,), {"forward": space["forward"]})
    assert digest_of(kind) == ""


@pytest.mark.parametrize(
    ("name", "attention", "kind", "forward"),
    [
        ("bert", "bidirectional", modeling_bert.BertIntermediate, _bert_intermediate),
        ("llama", "causal", modeling_llama.LlamaMLP, _llama_mlp),
    ],
)
def test_another_forward_upstream_means_the_models_own_layer_said_once(
    name: str,
    attention: str,
    kind: type[torch.nn.Module],
    forward: Forward,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = copy.deepcopy(tiny.model(name).base_model)
    plain, quick = (Backbone(copy.deepcopy(own), attention=attention) for _ in range(2))
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (4, 9)))
    expected = plain.states(ids, torch.ones_like(ids), layer=-1).numpy()
    monkeypatch.setattr(kind, "forward", forward)
    with caplog.at_level(logging.WARNING):
        optimize_for_cpu(quick)
        got = quick.states(ids, torch.ones_like(ids), layer=-1).numpy()
    assert any(type(module) is kind for module in quick.model.modules())
    assert same(got, expected)
    assert [record.getMessage().count(kind.__name__) for record in caplog.records] == [1]


def test_layers_that_cannot_be_imported_leave_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.save("bert", tmp_path)
    asked = Recipe(model=str(folder), attention="bidirectional", max_tokens=64, dtype="float32")
    expected = Encoder.from_recipe(asked, device="cpu").encode(["the quick brown fox"])
    # As it would be if transformers no longer had a name that they import.
    monkeypatch.setitem(sys.modules, "embedjob.encoder.cpu.optimize", None)
    with caplog.at_level(logging.WARNING, logger="embedjob"):
        encoder = Encoder.from_recipe(asked, device="cpu")
        got = encoder.encode(["the quick brown fox"])
    assert same(got, expected)
    assert sum("own layers" in record.getMessage() for record in caplog.records) == 1


_ON_A_GPU = """
import sys, torch
from embedjob.config.recipe import Recipe
from embedjob.encoder import backbone, encoder

def on_the_cpu(recipe, *, device, gpus, load=backbone.load_model):
    return load(recipe, device=torch.device("cpu"), gpus=gpus)

backbone.load_model = on_the_cpu
recipe = Recipe(model=sys.argv[1], attention="causal", max_tokens=64, dtype="float32")
backbone.load_backbone(recipe, device=torch.device("cuda"))
kinds = ("bert", "llama", "mistral", "qwen2", "t5")
unwanted = ("embedjob.encoder.cpu.", *(f"transformers.models.{kind}.modeling_" for kind in kinds))
print([name for name in sys.modules if name.startswith(unwanted)])
backbone.load_backbone(recipe, device=torch.device("cpu"))
print(sorted(name for name in sys.modules if name.startswith("embedjob.encoder.cpu.")))
"""


@pytest.mark.slow
def test_a_gpu_imports_nothing_of_a_cpus_layers(tmp_path: Path) -> None:
    folder = tiny.save("opt", tmp_path)
    command = [sys.executable, "-c", _ON_A_GPU, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    on_a_gpu, on_a_cpu = ended.stdout.splitlines()
    assert on_a_gpu == "[]"
    assert inspect.getmodule(digest_of).__name__ in on_a_cpu  # type: ignore[union-attr]
