"""Recipes of a job, laid over those of its method, role by role.

Covers: embedjob.methods.catalogue
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from embedjob.config.job_file import DEFAULT, JobSource, Layer
from embedjob.errors import ConfigError
from embedjob.job.resolve import config_around, layer_recipes, with_default_model
from embedjob.methods.catalogue import names, read_method, setting_for
from embedjob.models.architecture import check_model, info_of

METHOD: dict[str, Any] = {
    "summary": "a test",
    "citation": {"authors": "A", "title": "T", "year": 2026},
    "good_for": "tests",
    "licence": "none",
    "model": "the-model",
    "forward_tokens": "text",
    "encoder": {"span": "last_token", "max_tokens": 64},
    "roles": {"query": {"templates": ["query: {text}"]}},
}


def draft(tmp_path: Path, *, encoder: dict[str, Any], method: dict[str, Any] = METHOD) -> JobSource:
    path = tmp_path / "method.yaml"
    path.write_text(yaml.safe_dump(method))
    job = {
        "input": {"path": "in", "text": "body"},
        "encoder": {"method": str(path), **encoder},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": "out"},
    }
    return JobSource((Layer("job.yaml", job),))


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    """Every key is set by all the layers up to one, and the last of them is obeyed."""
    folder = {"encoder": {"max_tokens": 32, "span": "text", "pooling": "max", "layer": 3}}
    method = {**METHOD, "encoder": {"max_tokens": 64, "span": "last_token", "pooling": "mean"}}
    written = draft(
        tmp_path, encoder={"model": "m", "max_tokens": 128, "span": "all"}, method=method
    )
    last = Layer("--set encoder.max_tokens", {"encoder": {"max_tokens": 256}})
    found = layer_recipes(JobSource((*written.layers, last)), folder)
    recipe = found.recipe
    assert (recipe.max_tokens, recipe.span, recipe.pooling, recipe.layer) == (256, "all", "mean", 3)
    assert recipe.aggregation == "mean"
    assert found.origins["encoder.max_tokens"] == "--set encoder.max_tokens"
    assert found.origins["encoder.span"] == "job.yaml"
    assert found.origins["encoder.pooling"].startswith("method ")
    assert found.origins["encoder.layer"] == "model folder"
    assert found.origins.get("encoder.aggregation", DEFAULT) == DEFAULT


def test_each_role_has_its_own_recipe(tmp_path: Path) -> None:
    found = layer_recipes(draft(tmp_path, encoder={"model": "m"}), {})
    assert found.recipes["query"].templates == ("query: {text}",)
    assert found.recipes["document"].templates == ("{text}",)
    assert found.recipes["document"] == found.recipe
    assert {role: recipe.role for role, recipe in found.recipes.items()} == {
        role: role for role in ("query", "document", "symmetric")
    }


def test_a_job_in_the_query_role_takes_the_query_template(tmp_path: Path) -> None:
    found = layer_recipes(draft(tmp_path, encoder={"model": "m", "role": "query"}), {})
    assert found.recipe.templates == ("query: {text}",)


def test_a_template_of_the_job_serves_every_role(tmp_path: Path) -> None:
    found = layer_recipes(draft(tmp_path, encoder={"model": "m", "templates": ["mine {text}"]}), {})
    assert {recipe.templates for recipe in found.recipes.values()} == {("mine {text}",)}


@pytest.mark.parametrize(("gpus", "dtype"), [(0, "float32"), (1, "bfloat16"), (0.5, "bfloat16")])
def test_dtype_auto_is_settled_by_the_pool(tmp_path: Path, gpus: float, dtype: str) -> None:
    written = draft(tmp_path, encoder={"model": "m"})
    pool = Layer("--set", {"pool": {"gpus_per_actor": gpus}})
    found = layer_recipes(JobSource((*written.layers, pool)), {})
    assert {recipe.dtype for recipe in found.recipes.values()} == {dtype}


def test_the_method_names_the_model_where_the_job_does_not(tmp_path: Path) -> None:
    found = with_default_model(draft(tmp_path, encoder={}))
    assert found.get("encoder.model") == "the-model"
    assert with_default_model(draft(tmp_path, encoder={"model": "m"})).get("encoder.model") == "m"
    with pytest.raises(ConfigError, match=r"encoder\.model: is required"):
        with_default_model(JobSource((Layer("job", {"encoder": {}}),)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder": {"poolin": "mean"}}, "unknown key poolin"),
        ({"encoder": {"pooling": "meen"}}, r"method\.yaml: encoder\.pooling: got .*meen"),
        ({"roles": {"quary": {}}}, "roles"),
        ({"roles": {"query": {"span": "nothing"}}}, "nothing"),
        ({"citation": {"authors": "A"}}, "citation.title: is required"),
        ({"encoder": {"role": "query"}}, "a method cannot set role"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"encoder": {"model": "m"}}, r"method\.yaml: a method cannot set model"),
        (
            {"encoder": {"templates": []}},
            r"method\.yaml: encoder\.templates: got \[\], allowed is a list of",
        ),
        (
            {"encoder": {"layer": []}},
            r"method\.yaml: encoder\.layer: got \[\], .*a list of at least one",
        ),
        (
            {"encoder": {"finish": [{}]}},
            r"method\.yaml: encoder\.finish\.0: got {}, .* one of the keys normalize, truncate",
        ),
        (
            {"encoder": {"finish": [{"whiten": "w", "flow": "f"}]}},
            r"finish: .* exactly one key; got whiten and flow",
        ),
        ({"encoder": {"finish": [{"whiten": "w"}]}}, "whiten: got w, but fit: makes none"),
        (
            {"encoder": {"templates": ["no slot"]}},
            r"method\.yaml: encoder\.templates: 'no slot' has 0 \{text\} slots; exactly one",
        ),
        (
            {"roles": {"query": {"templates": ["no slot"]}}},
            r"method\.yaml: roles\.query: encoder\.templates: 'no slot' has 0 \{text\} slots",
        ),
        (
            {"encoder": {"span": "pooled", "templates": [[{"text": {}}]]}},
            r"method\.yaml: encoder\.span: no segment .* has pool: true; give it to the segments",
        ),
        (
            {"encoder": {"span": {"rule": "text", "alone": True}}},
            r"method\.yaml: encoder\.span: alone counts the last segments",
        ),
        (
            {"encoder": {"templates": [{"template": "{text}", "weight": 0.5}]}},
            r"method\.yaml: encoder\.aggregation: got mean, but a template has weight: 0\.5",
        ),
        (
            {"encoder": {"templates": [{"template": "{text}", "weight": 0}]}},
            r"^[^\n]*method\.yaml: [^\n]*greater than 0[^\n]*$",
        ),
        ({"encoder": {"templates": [{"template": "{text}", "weight": -1}]}}, "greater than 0"),
        (
            {"encoder": {"templates": [{"template": "{text}", "weight": float("inf")}]}},
            "a finite number",
        ),
    ],
)
def test_a_malformed_method_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        layer_recipes(draft(tmp_path, encoder={"model": "m"}, method={**METHOD, **change}), {})


def test_a_method_may_leave_its_instruction_to_the_job(tmp_path: Path) -> None:
    method = {**METHOD, "encoder": {"templates": ["{instruction} {text}"]}, "roles": None}
    encoder = {"model": "m", "instruction": "Find"}
    found = layer_recipes(draft(tmp_path, encoder=encoder, method=method), {})
    assert found.recipes["query"].instruction == "Find"


def test_special_tokens_of_a_role_are_laid_over_the_methods_own_key_by_key(tmp_path: Path) -> None:
    specials = {"eos": "append", "eos_id": 7}
    roles = {"query": {"special_tokens": {"bos": "none"}}}
    method = {**METHOD, "encoder": {"special_tokens": specials}, "roles": roles}
    folder = {
        "encoder": {"special_tokens": {"add": ["<x>"]}},
        "roles": {"query": {"special_tokens": {"add": ["<y>"]}}},
    }
    found = layer_recipes(draft(tmp_path, encoder={"model": "m"}, method=method), folder).recipes
    assert found["query"].special_tokens.model_dump() == {
        **specials,
        "bos": "none",
        "add": ("<y>",),
    }
    assert found["document"].special_tokens.bos == "auto"
    assert found["document"].special_tokens.add == ("<x>",)


def test_a_roles_special_tokens_are_checked_over_the_methods_own(tmp_path: Path) -> None:
    roles = {"query": {"special_tokens": {"eos": "sometimes"}}}
    written = draft(tmp_path, encoder={}, method={**METHOD, "roles": roles})
    with pytest.raises(ConfigError, match=r"roles\.query: encoder\.special_tokens\.eos: got"):
        read_method(written.get("encoder.method"))


EXAMPLE = {"text": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("encoder", "key"),
    [
        ({"instruction": "Find"}, "instruction"),
        ({"demonstrations": ["One."]}, "demonstrations"),
        ({"demonstration": "{text} {answer}"}, "demonstration"),
        ({"demonstrations_count": False}, "demonstrations_count"),
        ({"instruction": "Find", "templates": ["{{instruction}} {text}"]}, "instruction"),
        # The pattern has the slot, and no template has one for the pattern.
        ({"instruction": "F", "demonstration": "{instruction}{text}{answer}"}, "instruction"),
    ],
)
def test_what_no_template_reads_is_refused(
    tmp_path: Path, encoder: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^encoder\.{key}: is set, but no template"):
        layer_recipes(draft(tmp_path, encoder={"model": "m", **encoder}), {})


@pytest.mark.parametrize(
    "encoder",
    [
        {"instruction": "Find", "templates": ["{instruction} {text}"]},
        {"instruction": "Find", "templates": [[{"instruction": {}}, {"text": {}}]]},
        {"demonstrations": ["One."], "templates": ["{demonstrations} {text}"]},
        {
            "instruction": "Find",
            "demonstrations": [EXAMPLE],
            "demonstration": "{instruction} {text} {answer}",
            "templates": ["{demonstrations} {text}"],
        },
        {
            "instruction": "Find",
            "interventions": [
                {"contrast": {"template": "{instruction}{text}", "layer": 0, "mode": "norm"}}
            ],
        },
    ],
)
def test_what_a_template_reads_is_taken(tmp_path: Path, encoder: dict[str, Any]) -> None:
    found = layer_recipes(draft(tmp_path, encoder={"model": "m", **encoder}), {}).recipe
    assert all(getattr(found, key) for key in encoder)


def test_what_a_template_of_another_role_reads_is_taken(tmp_path: Path) -> None:
    roles = {"query": {"templates": ["{instruction} {text}"], "instruction": "theirs"}}
    encoder = {"model": "m", "instruction": "Find"}
    written = draft(tmp_path, encoder=encoder, method={**METHOD, "roles": roles})
    assert layer_recipes(written, {}).recipes["query"].instruction == "Find"


def test_a_weight_that_the_aggregation_does_not_read_is_refused(tmp_path: Path) -> None:
    templates = [{"template": "{text}", "weight": 2.0}, "x {text}"]
    weighted = {"model": "m", "templates": templates, "aggregation": "weighted"}
    assert layer_recipes(draft(tmp_path, encoder=weighted), {}).recipe.templates[1] == "x {text}"
    with pytest.raises(ConfigError, match=r"encoder\.aggregation: got max, but .* weight: 2\.0"):
        layer_recipes(draft(tmp_path, encoder={**weighted, "aggregation": "max"}), {})


def test_a_method_without_published_weights_asks_for_a_model() -> None:
    layer = Layer("job", {"encoder": {"method": "autoregembed"}})
    with pytest.raises(ConfigError, match=r"encoder\.model: .* no weights were published"):
        with_default_model(JobSource((layer,)))
    assert read_method("autoregembed").model is None


TINY = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}
FOR_TINY = {
    "config": {**TINY, "vocab_size": 49152},
    "because": "tried",
    "encoder": {"max_tokens": 32, "layer": 3},
    "roles": {"query": {"max_tokens": 16}},
}
FITTED = {**METHOD, "for_models": {"Tiny": FOR_TINY}}
ITS_CONFIG = {**FOR_TINY["config"], "torch_dtype": "bfloat16"}


def test_a_model_gets_what_its_method_has_for_it_over_the_method_s_own(tmp_path: Path) -> None:
    written = draft(tmp_path, encoder={"model": "/a/copy", "layer": 5}, method=FITTED)
    found = layer_recipes(written, {}, ITS_CONFIG)
    assert (found.recipe.max_tokens, found.recipe.span, found.recipe.layer) == (32, "last_token", 5)
    assert found.recipes["query"].max_tokens == 16
    assert found.recipes["query"].templates == ("query: {text}",)
    assert found.origins["encoder.max_tokens"].endswith("method.yaml for Tiny")
    assert found.origins["encoder.span"].endswith("method.yaml")
    assert found.origins["encoder.layer"] == "job.yaml"
    inner = {"model_type": "wrapped", "text_config": ITS_CONFIG}
    assert layer_recipes(written, {}, inner).recipe.max_tokens == 32


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        TINY,  # says nothing of its vocabulary
        {**ITS_CONFIG, "vocab_size": 49153},
        {**ITS_CONFIG, "num_hidden_layers": 24},
        {**ITS_CONFIG, "model_type": "mistral"},
        {**ITS_CONFIG, "hidden_size": "576"},
    ],
)
def test_no_other_model_gets_it(tmp_path: Path, config: dict[str, Any] | None) -> None:
    written = draft(tmp_path, encoder={"model": "Tiny"}, method=FITTED)
    found = layer_recipes(written, {}, config)
    assert (found.recipe.max_tokens, found.recipe.layer) == (64, -1)
    assert found.recipes["query"].max_tokens == 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"model_type": "llama"}}, r"for_models\.Tiny\.config: needs num_hidden_layers"),
        ({"encoder": {"adapters": []}}, r"for_models\.Tiny: a method cannot set adapters"),
        ({"encoder": {"span": "nowhere"}}, r"for_models\.Tiny: encoder\.span: got"),
        ({"roles": {"query": {"span": "nowhere"}}}, r"for_models\.Tiny: encoder\.span: got"),
        # The query's own template would be gone without a word.
        ({"encoder": {"templates": ["{text}"]}}, r"set it in .*for_models\.Tiny\.roles\.query too"),
        ({"because": None}, "because"),
    ],
)
def test_a_malformed_setting_for_a_model_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    method = {**METHOD, "for_models": {"Tiny": {**FOR_TINY, **change}}}
    written = draft(tmp_path, encoder={"model": "m"}, method=method)
    with pytest.raises(ConfigError, match=said):
        layer_recipes(written, {})


def test_a_model_that_two_settings_take_for_theirs_is_refused(tmp_path: Path) -> None:
    method = {**METHOD, "for_models": {"Tiny": FOR_TINY, "Small": {**FOR_TINY, "config": TINY}}}
    written = draft(tmp_path, encoder={"model": "m"}, method=method)
    with pytest.raises(ConfigError, match="Small and Tiny are one model by their config"):
        layer_recipes(written, {}, ITS_CONFIG)


@pytest.mark.parametrize("name", names())
def test_no_model_is_two_models_of_one_method(name: str) -> None:
    method = read_method(name)
    for told, setting in (method.for_models or {}).items():
        assert setting_for(method, setting.config)[0] == told


def test_the_paper_s_setting_runs_on_a_model_of_24_blocks() -> None:
    layer = Layer("job", {"encoder": {"method": "token_prepending", "model": "m"}})
    config = {"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896}
    recipe = layer_recipes(JobSource((layer,)), {}, config).recipe
    check_model(recipe, info_of(config))
    [given] = recipe.model_dump(mode="json", exclude_defaults=True)["interventions"]
    assert given == {"prepend": {"slot": "<PST>", "start": 1, "exit": 7, "seed": 3407}}
    assert recipe.layer == -2


def test_an_unknown_method_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match=r"got 'prompteoll', allowed are autoregembed, bert_cls"):
        read_method("prompteoll")


@pytest.mark.parametrize("name", names())
def test_every_method_that_ships_is_sound(name: str) -> None:
    method = read_method(name)
    assert method.citation.year > 2000
    assert method.summary.strip()


WHITENED = {
    **METHOD,
    "encoder": {"finish": [{"whiten": "w"}, {"normalize": True}]},
    "fit": [{"kind": "whiten", "name": "w", "dimensions": 4}],
}


def test_a_method_brings_the_fits_of_its_steps(tmp_path: Path) -> None:
    written = draft(tmp_path, encoder={"model": "m"}, method=WHITENED)
    [fit] = config_around(layer_recipes(written, {}), written).fit
    assert (fit.kind, fit.name, fit.dimensions, fit.sample) == ("whiten", "w", 4, 100_000)


def test_a_job_has_its_own_fits_in_place_of_a_method_s(tmp_path: Path) -> None:
    written = draft(tmp_path, encoder={"model": "m"}, method=WHITENED)
    own = [{"kind": "whiten", "name": "w", "dimensions": 2, "sample": 10}]
    source = JobSource((*written.layers, Layer("job.yaml", {"fit": own})))
    [fit] = config_around(layer_recipes(source, {}), source).fit
    assert (fit.dimensions, fit.sample) == (2, 10)


def test_a_fit_whose_step_the_job_leaves_out_is_left_out_too(tmp_path: Path) -> None:
    encoder = {"model": "m", "finish": [{"normalize": True}]}
    written = draft(tmp_path, encoder=encoder, method=WHITENED)
    assert config_around(layer_recipes(written, {}), written).fit == ()


def test_a_method_with_a_step_and_no_fit_for_it_is_refused(tmp_path: Path) -> None:
    method = {**WHITENED, "fit": []}
    with pytest.raises(ConfigError, match="whiten: got w, but fit: makes none"):
        layer_recipes(draft(tmp_path, encoder={"model": "m"}, method=method), {})
