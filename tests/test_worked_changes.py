"""The worked changes of docs/architecture.md, applied to a copy of the package and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
# The most files that each change may cost.
COSTS = {"A pooling": 2, "A pooling with weights": 3, "An intervention": 3}

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import load_file, save_file
import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError
from tests.encoder import tiny

folder = tiny.save("llama", Path(sys.argv[1]))
model = tiny.model("llama").base_model
score = torch.linspace(-1, 1, 32)
weights = load_file(folder / "model.safetensors")
save_file({**weights, "token_score.weight": score}, folder / "model.safetensors", {"format": "pt"})
TEXT = "The quick brown fox, isn't it?"
ids = torch.tensor([tiny.tokenizer("llama").encode(TEXT).ids])

def states(ids=ids):
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state[0]

def ours(**keys):
    config = {"model": str(folder), "dtype": "float32", "max_tokens": 64, "finish": [], **keys}
    return Encoder.from_config(config, device="cpu").encode([TEXT])[0]

def refused(**keys):
    try:
        ours(**keys)
    except ConfigError as error:
        return str(error)

plain = states()
expected = {
    "pooling": plain.median(dim=0).values,
    "weights": (plain @ score).softmax(dim=0) @ plain,
}

def halved(block):
    return block.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 0.5, *args[1:]), kwargs), with_kwargs=True
    )

hooks = [halved(model.layers[1])]
expected["intervention"] = states().mean(dim=0)
# Views that begin alike may share what they begin with, but not where every token is changed.
PROMPT = "Represent this text for search:"
before = len(tiny.tokenizer("llama").encode(PROMPT).ids)
prompted = torch.tensor([tiny.tokenizer("llama").encode(f"{PROMPT} {TEXT}").ids])
hooks[0].remove()
hooks.append(halved(model.layers[0]))
expected["prompted"] = states(prompted)[before:].mean(dim=0)
found = {
    "pooling": ours(pooling="median"),
    "weights": ours(pooling="scored_mean"),
    "intervention": ours(method="scaled_states"),
    "prompted": ours(
        method="scaled_states",
        templates=[PROMPT + " {text}"],
        span="text",
        interventions=[{"scale": {"layer": 0, "factor": 0.5}}],
    ),
}
print(json.dumps({
    "package": embedjob.__file__,
    "unlike": {
        key: float(np.abs(found[key] - expected[key].numpy()).max()) for key in found
    },
    "apart": float(np.abs(found["intervention"] - plain.mean(dim=0).numpy()).max()),
    "refused": [
        refused(pooling="scored_mean", long_text="late_chunk"),
        refused(interventions=[{"scale": {"layer": 1, "factor": "half"}}]),
    ],
}))
"""


def _diffs() -> dict[str, str]:
    """The diff under each heading of the page that has one."""
    sections = re.split(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    pairs = zip(sections[::2], sections[1::2], strict=True)
    found = {title: re.findall(r"```diff\n(.*?)```", text, re.S) for title, text in pairs}
    return {title: "".join(diffs) for title, diffs in found.items() if diffs}


def _changed(diff: str) -> set[str]:
    return set(re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the changed copy of the package says of itself, in a fresh process."""
    place = tmp_path_factory.mktemp("worked")
    shutil.copytree(
        ROOT / "embedjob", place / "embedjob", ignore=shutil.ignore_patterns("__pycache__")
    )
    for title, diff in _diffs().items():
        applied = subprocess.run(
            ["git", "apply", "--verbose", "-"],
            input=diff,
            cwd=place,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(place.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert applied.returncode == 0, (
            f"the diff under '{title}' in docs/architecture.md does not apply: the lines around it"
            f" were changed. Write its context there anew.\n{applied.stderr}"
        )
    paths = os.pathsep.join([str(place), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place / "model")],
        cwd=place,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(place)
    return found


def test_each_change_costs_no_more_than_is_promised() -> None:
    assert {title: len(_changed(diff)) for title, diff in _diffs().items()} == COSTS


@pytest.mark.parametrize("change", ["pooling", "weights", "intervention", "prompted"])
def test_vectors_follow_the_formula_that_was_added(change: str, report: dict[str, Any]) -> None:
    assert report["unlike"][change] < 1e-5
    assert report["apart"] > 1e-3


def test_what_the_new_entries_cannot_do_is_refused(report: dict[str, Any]) -> None:
    divided, misread = report["refused"]
    assert "pooling: got scored_mean, and with long_text: late_chunk" in divided
    assert 'interventions.0.scale.factor: got "half", allowed is a valid number' in misread
