import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedjob.config.recipe import HubModel, Recipe
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, ModelError, OutputError
from embedjob.models.architecture import model_info
from embedjob.models.checkpoint import ADAPTER
from embedjob.models.components import components_of
from embedjob.models.digests import file_digests, model_digests
from embedjob.models.source import ModelSource, materialize, source_of
from embedjob.output.claim import Claim, Probes, put_claim
from embedjob.output.fingerprint import fingerprint
from embedjob.storage import objects
from tests.encoder import tiny
from tests.encoder.adapting import INSIDE, save_adapter

TEXTS = ["the quick fox", "a dog"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    return tiny.save("llama", tmp_path / "base")


@pytest.fixture
def mntp(base: Path, tmp_path: Path) -> Path:
    """An adapter laid out as LLM2Vec's: with the config and tokenizer of the model under it."""
    folder = save_adapter(tmp_path / "mntp", 1, base_model_name_or_path=str(base))
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, folder / name)
    return folder


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "second", 2, prefix=INSIDE)


def recipe(model: Path | str, *adapters: Any, **knobs: Any) -> Recipe:
    named = tuple(str(one) if isinstance(one, Path) else one for one in adapters)
    known = {"model": str(model), "adapters": named, "max_tokens": 40, "dtype": "float32"}
    return Recipe(**{**known, **knobs})


def embeddings(one: Recipe) -> Any:
    return Encoder.from_recipe(one, device="cpu").encode(TEXTS)


def test_a_model_that_is_an_adapter_is_its_base_with_it_merged(
    base: Path, mntp: Path, second: Path
) -> None:
    alone, both = embeddings(recipe(mntp)), embeddings(recipe(mntp, second))
    assert np.array_equal(alone, embeddings(recipe(base, mntp)))
    assert np.array_equal(both, embeddings(recipe(base, mntp, second)))
    bare = embeddings(recipe(base))
    for one, other in ((bare, alone), (alone, both), (bare, both)):
        assert not np.allclose(one, other, atol=1e-3)
    assert model_info(source_of(recipe(mntp))) == model_info(source_of(recipe(base)))


def test_a_copy_of_the_base_may_lie_elsewhere(base: Path, mntp: Path, tmp_path: Path) -> None:
    expected = embeddings(recipe(mntp))
    found = model_digests(components_of(recipe(mntp)))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"encoder\.base: .*base does not exist"):
        components_of(recipe(mntp)).pinned()
    with pytest.raises(ModelError, match=r"encoder\.base"):
        model_info(source_of(recipe(mntp)))
    again = recipe(mntp, base=str(moved))
    assert np.array_equal(embeddings(again), expected)
    assert model_digests(components_of(again)) == found


def test_a_base_that_nobody_needs_or_names_is_told(base: Path, mntp: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder\.base: got .*weights of its own; leave base"):
        components_of(recipe(base, base=str(base)))
    config = json.loads((mntp / "adapter_config.json").read_text())
    (mntp / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(
        ModelError, match=r"does not name the model that it adapts; set encoder\.base"
    ):
        components_of(recipe(mntp))


def test_an_adapter_without_a_config_is_no_model(second: Path) -> None:
    with pytest.raises(ModelError, match=r"give its model as encoder\.model, and the adapter in"):
        materialize(ModelSource(str(second)), tokenizer_only=True)


def test_the_digests_are_those_of_all_parts_in_order(base: Path, mntp: Path, second: Path) -> None:
    own = file_digests(ModelSource(str(base)))
    first, then = (
        file_digests(ModelSource(str(folder), layout=ADAPTER)) for folder in (mntp, second)
    )
    assert sorted(first) == ["adapter_config.json", "adapter_model.safetensors"]
    assert model_digests(components_of(recipe(base))) == own
    numbered = [
        {f"adapters/{number}/{name}": one for name, one in found.items()}
        for number, found in enumerate((first, then))
    ]
    assert (
        model_digests(components_of(recipe(base, mntp, second))) == own | numbered[0] | numbered[1]
    )
    found = model_digests(components_of(recipe(mntp, second)))
    assert found == numbered[0] | numbered[1] | {
        "config.json": own["config.json"],
        "tokenizer.json": own["tokenizer.json"],
        "base/config.json": own["config.json"],
        "base/model.safetensors": own["model.safetensors"],
    }


def test_the_fingerprint_follows_what_adapters_are_and_not_where(
    base: Path, mntp: Path, second: Path, tmp_path: Path
) -> None:
    def mark(*adapters: Path) -> str:
        made = recipe(base, *adapters)
        return fingerprint(made, model_digests(components_of(made)))

    marks = [mark(), mark(mntp), mark(mntp, second), mark(second, mntp)]
    assert len(set(marks)) == len(marks)
    copied = Path(shutil.copytree(second, tmp_path / "copy"))
    assert mark(mntp, copied) == marks[2]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with (copied / name).open("ab") as file:
            file.write(b" ")
        marks.append(mark(mntp, copied))
    assert len(set(marks)) == len(marks)


def test_parts_are_pinned_to_places_that_every_node_reads_alike(
    base: Path, mntp: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    keys = components_of(recipe("./mntp", "./second")).pinned().keys()
    assert keys == {
        "model": str(mntp),
        "revision": None,
        "base": str(base),
        "adapters": (str(second),),
    }
    again = recipe("x").model_copy(update=keys)
    assert Recipe.model_validate_json(again.model_dump_json()) == again
    assert components_of(again).pinned().keys() == keys
    assert components_of(recipe("./base")).pinned().keys()["base"] is None


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("/not/there", "/not/there does not exist; allowed is an adapter directory"),
        ("package:not_there/x", "no package 'not_there' is installed"),
        ("base", r"has no adapter_config\.json; found: config\.json, .*PEFT adapter"),
        ("model.gguf", r"is a file; allowed is an adapter directory"),
    ],
)
def test_an_adapter_that_is_not_there_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, said: str
) -> None:
    monkeypatch.chdir(base.parent)
    Path("model.gguf").touch()
    with pytest.raises(ModelError, match=rf"encoder\.adapters: .*{said}"):
        components_of(recipe(base, adapter))


def test_an_adapter_without_weights_is_refused_before_the_model_is_loaded(
    base: Path, second: Path
) -> None:
    (second / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"encoder\.adapters: .*no weights \(adapter_model"):
        model_digests(components_of(recipe(base, second)))


def test_an_adapter_comes_out_of_a_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path / "site" / "brings_an_adapter" / "lora", 2, prefix=INSIDE)
    (tmp_path / "site" / "brings_an_adapter" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    named = recipe(base, "package:brings_an_adapter/lora")
    placed = recipe(base, tmp_path / "site" / "brings_an_adapter" / "lora")
    assert model_digests(components_of(named)) == model_digests(components_of(placed))
    assert components_of(named).pinned().keys()["adapters"] == named.adapters


def test_adapters_and_their_base_in_s3_are_brought_whole(
    base: Path, mntp: Path, second: Path, bucket: str
) -> None:
    for folder in (base, mntp, second):
        for path in folder.iterdir():
            objects.create(f"{bucket}/{folder.name}/{path.name}", path.read_bytes())
    there = recipe(f"{bucket}/mntp", f"{bucket}/second", base=f"{bucket}/base")
    here = recipe(mntp, second)
    assert model_digests(components_of(there)) == model_digests(components_of(here))
    assert components_of(there).pinned().keys()["adapters"] == there.adapters
    assert np.array_equal(embeddings(there), embeddings(here))


def test_queries_are_embedded_with_the_adapters_that_wrote(
    base: Path, mntp: Path, second: Path, tmp_path: Path
) -> None:
    made = recipe(mntp, second)
    parts = components_of(made).pinned()
    made = made.model_copy(update=parts.keys())
    found = model_digests(parts)
    out = str(tmp_path / "out")
    claim = Claim(
        chunk_rows=100,
        fingerprint=fingerprint(made, found),
        recipes={"document": made.model_dump(mode="json")},
        digests=found,
        schema={},
        probes=Probes([], [], []),
        versions={},
    )
    put_claim(out, claim)
    expected = embeddings(made)
    assert np.array_equal(Encoder.from_output(out, device="cpu").encode(TEXTS), expected)
    places = [path.rename(tmp_path / f"moved-{path.name}") for path in (mntp, base, second)]
    with pytest.raises(ModelError, match="does not exist"):
        Encoder.from_output(out)
    model, under, adapter = map(str, places)
    moved = Encoder.from_output(out, model=model, base=under, adapters=[adapter], device="cpu")
    assert np.array_equal(moved.encode(TEXTS), expected)
    save_adapter(Path(adapter), 3, prefix=INSIDE)
    with pytest.raises(ModelError, match=r"is not the model that wrote .*adapters/1/adapter_model"):
        Encoder.from_output(out, model=model, base=under, adapters=[adapter])
    put_claim(str(tmp_path / "other"), replace(claim, fingerprint="0" * 64))
    with pytest.raises(OutputError, match="was it edited"):
        Encoder.from_output(str(tmp_path / "other"), model=model, base=under, adapters=[adapter])


def test_one_encoder_holds_one_set_of_adapters(base: Path, second: Path) -> None:
    document = recipe(base, second)
    query = recipe(base, role="query")
    with pytest.raises(ConfigError, match=r"encoder\.adapters: got \(\) for the role query"):
        Encoder.from_recipe(document, recipes={"query": query}, device="cpu")


def test_a_commit_of_the_hub_is_said_in_the_recipe() -> None:
    named = Recipe.model_validate(
        {"model": "m", "adapters": ({"id": "us/a", "revision": "abc"}, "us/b")}
    )
    assert named.adapters == (HubModel(id="us/a", revision="abc"), "us/b")
