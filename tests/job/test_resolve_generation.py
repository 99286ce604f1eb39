import json
from typing import Any

import numpy as np
import pytest

from embedjob.config.job_file import JobSource, job_source
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, EmbedjobError, ModelError
from embedjob.job.resolve import identify, resolve
from embedjob.job.resolve_generation import moved_generator
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests, tokenizer_digests
from embedjob.output.fingerprint import fingerprint, generation_fingerprint
from tests.encoder.tiny import CHAT, save, save_chat

KINDS = {"shorter": {"instruction": "Say less."}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("chat", 3), ("other", 4)):
        save_chat(folder / name, seed=seed)
    save_chat(folder / "base", template=None)
    for name in ("bert",):
        save(name, folder / name)
    return {path.name: str(path) for path in folder.iterdir()}


def source(models: dict[str, str], *sets: str, **sections: Any) -> JobSource:
    job: dict[str, Any] = {
        "input": {"path": "in", "text": "t"},
        "encoder": {"model": models["chat"]},
        "output": {"path": "out"},
        "pool": {"gpus_per_actor": 0},
    }
    return job_source({**job, **sections}, sets)


def test_a_job_without_the_section_generates_nothing(models: dict[str, str]) -> None:
    job = resolve(source(models))
    assert job.config.generate is None
    assert job.config.encoder.generate is None


def test_a_method_brings_its_generator_and_the_job_overrides_it(models: dict[str, str]) -> None:
    job = resolve(
        source(
            models,
            "generate.seed=7",
            encoder={"model": models["chat"], "method": "geneol"},
            generate={"count": 1, "max_prompt_tokens": 3000, "pool": {"actors": 1}},
        )
    )
    made = job.config.encoder.generate
    assert made is not None
    assert list(made.kinds) == ["paraphrase", "restructured", "entailed", "concise"]
    assert (made.count, made.seed, made.shots, made.dtype) == (1, 7, 5, "float32")
    # The encoder's own model, with what its files say.
    assert (made.model, made.chat_template) == (models["chat"], CHAT)
    assert job.config.generate is not None
    assert job.config.generate.pool.actors == 1
    assert job.origins["generate.count"] == "job"
    assert job.origins["generate.seed"] == "--set generate.seed"
    assert job.origins["generate.kinds"] == "method geneol"
    assert job.origins["generate.model"] == "encoder.model"
    assert job.origins["generate.chat_template"] == "the generator's folder"
    assert all(recipe.generate == made for recipe in job.recipes.values())


def test_null_generates_nothing_with_a_method_that_would(models: dict[str, str]) -> None:
    geneol = {"model": models["chat"], "method": "geneol"}
    assert resolve(source(models, encoder=geneol, generate=None)).config.generate is None


def test_another_method_embeds_what_geneol_makes(models: dict[str, str]) -> None:
    job = resolve(
        source(
            models,
            encoder={"model": models["other"], "method": "prompteol"},
            generate={"method": "geneol", "model": models["chat"], "max_prompt_tokens": 3000},
        )
    )
    assert job.config.encoder.generate is not None
    assert job.config.encoder.generate.model == models["chat"]


@pytest.mark.parametrize(
    ("encoder", "generate", "said"),
    [
        ({}, {"count": 1}, "no method is named, and generate.kinds is not given"),
        ({"method": "prompteol"}, {"count": 1}, "generate.method: prompteol generates nothing"),
        ({}, {"kinds": KINDS, "engine": "vllm"}, "generate.engine: got vllm, which is not inst"),
        ({}, {"kinds": KINDS, "model": "base"}, "has no chat template"),
        ({}, {"kinds": KINDS, "model": "bert"}, "is an encoder, which says nothing"),
        ({}, {"kinds": KINDS, "model": "/nowhere"}, "generate.model: /nowhere does not exist"),
        ({}, {"kinds": KINDS, "top_p": 0}, "generate.top_p: got 0"),
        ({}, {"kinds": {"a b": KINDS["shorter"]}}, "generate.kinds.a b: got"),
        ({}, {"kinds": KINDS, "cout": 2}, "unknown key cout; allowed are"),
        ({}, {"kinds": KINDS, "summary": "Sum up."}, "allowed is a text with one {text}"),
        ({}, {"kinds": KINDS, "max_prompt_tokens": 5}, "but kind shorter with a short text has"),
        ({"aggregation": "keep"}, {"kinds": KINDS}, "got encoder.aggregation: keep"),
        ({"long_text": "chunk_mean"}, {"kinds": KINDS}, "got encoder.long_text: chunk_mean"),
        ({"vector_dtype": "int8"}, {"kinds": KINDS}, "got encoder.vector_dtype: int8"),
        ({"heads": [{"sparse_lm": {}}]}, {"kinds": KINDS}, "got encoder.heads: sparse_lm"),
        ({"generate": {}}, None, "encoder.generate: generate is a section of its own"),
        ({"generate": {"count": 1}}, None, "generate is a section of its own"),
    ],
)
def test_what_cannot_generate_is_refused_with_its_key(
    models: dict[str, str], encoder: dict[str, Any], generate: Any, said: str
) -> None:
    if generate and generate.get("model") in models:
        generate = {**generate, "model": models[generate["model"]]}
    job = source(models, encoder={"model": models["chat"], **encoder}, generate=generate)
    with pytest.raises(EmbedjobError) as refused:
        resolve(job)
    assert said in str(refused.value)
    assert isinstance(refused.value, ConfigError | ModelError)


def test_a_template_of_the_jobs_own_makes_a_base_model_a_generator(models: dict[str, str]) -> None:
    own = {"kinds": KINDS, "model": models["base"], "chat_template": CHAT, "stop_ids": [4]}
    made = resolve(source(models, generate=own)).config.encoder.generate
    assert made is not None
    assert (made.chat_template, made.stop_ids) == (CHAT, (4,))


def test_the_generators_files_and_settings_are_part_of_the_fingerprint(
    models: dict[str, str],
) -> None:
    own = {"kinds": KINDS, "model": models["other"]}
    plain, made = identify(resolve(source(models))), identify(resolve(source(models, generate=own)))
    assert made.digests.items() > plain.digests.items()
    assert {name for name in made.digests if name.startswith("generator/")} == {
        f"generator/{name}" for name in plain.digests
    }
    recipe = made.config.encoder
    assert recipe.generate is not None
    assert tokenizer_digests(components_of(recipe)).keys() == {
        "tokenizer.json",
        "generator/tokenizer.json",
    }
    assert model_digests(components_of(recipe)) == made.digests
    prints = {plain.fingerprint, made.fingerprint}
    generations = {generation_fingerprint(recipe.generate, made.digests)}
    for key, value in {
        "count": 2,
        "seed": 1,
        "temperature": 0.0,
        "top_p": 0.5,
        "max_new_tokens": 9,
        "summaries": True,
        "acknowledgement": "Yes.",
        "kinds": {"shorter": {"instruction": "Say little."}},
    }.items():
        other = identify(resolve(source(models, generate={**own, key: value})))
        assert other.config.encoder.generate is not None
        prints.add(other.fingerprint)
        generations.add(generation_fingerprint(other.config.encoder.generate, other.digests))
    assert (len(prints), len(generations)) == (10, 9)
    elsewhere = recipe.model_copy(
        update={
            "generate": recipe.generate.model_copy(update={"model": "/copy", "summary": "{text}"})
        }
    )
    assert fingerprint(elsewhere, made.digests) == made.fingerprint


def test_an_encoder_of_the_method_generates_without_a_job(models: dict[str, str]) -> None:
    keys = {"kinds": KINDS, "max_new_tokens": 4}
    given: dict[str, Any] = {"model": models["chat"], "device": "cpu", "finish": []}
    encoder = Encoder.from_method("knowledge_enhanced", generate=keys, **given)
    [made] = encoder.generated(["A fox."])
    assert len(made) == 1
    alone = Encoder.from_method("knowledge_enhanced", **given)
    with pytest.raises(ConfigError, match="the recipe generates nothing"):
        alone.generated(["A fox."])
    mean = alone.encode(["A fox.", *made]).mean(axis=0)
    assert np.allclose(encoder.encode(["A fox."])[0], mean, atol=1e-5)


def test_a_generator_that_lies_elsewhere_is_found_there() -> None:
    recorded = {"model": "a", "generate": {"model": "a", "seed": 1}}
    assert moved_generator({"model": "a"}, {"model": "b"}) == {}
    assert moved_generator(recorded, {})["generate"]["model"] == "a"
    assert moved_generator(recorded, {"model": "b"})["generate"]["model"] == "b"
    assert moved_generator(recorded, {"generator": "c"})["generate"]["model"] == "c"
    other = {**recorded, "generate": {"model": "x"}}
    assert moved_generator(other, {"model": "b"}) == {"generate": {"model": "x"}}
    assert json.dumps(recorded)  # nothing was changed in it
