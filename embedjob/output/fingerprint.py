"""Fingerprints: hashes of what decides a vector's value, and of what decides a file's rows."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from embedjob.config.generation import Generation
from embedjob.config.interventions import auxiliary_templates
from embedjob.config.job import Input, SampledInput
from embedjob.config.pooling import SpanOffset, SpanTag, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.config.segments import Segment, WeightedTemplate
from embedjob.output.file_names import digest

SCHEMA_VERSION = 1

# Frozen: only knobs that differ from these are hashed, so that neither a knob added later nor a
# default changed later changes anyone's fingerprint. A knob added later is put in LATER with the
# value that means "as before"; nothing in either table is ever edited.
VERSION_1: Mapping[str, Any] = {
    "adapters": [],
    "instruction": None,
    "demonstrations": [],
    "prepare": "none",
    "templates": ["{text}"],
    "special_tokens.bos": "auto",
    "special_tokens.eos": "none",
    "special_tokens.eos_id": None,
    "special_tokens.add": [],
    "attention": "causal",
    "layer": -1,
    "span": "all",
    "pooling": "mean",
    "aggregation": "mean",
    "interventions": [],
    "heads": [],
    "finish": [{"normalize": True}],
    "vector_dtype": "float32",
    "max_tokens": 512,
    "long_text": "truncate",
    "dtype": "float32",
}
LATER: Mapping[str, Any] = {
    "demonstration": None,
    "decode": None,
    "demonstrations_count": True,
    "quantize": "none",
    "word_cut": None,
    "truncation_side": "right",
    "generate": None,
    "split": {},
}

# The digests identify a model, wherever it lies; method and role choose templates before the
# recipe is resolved; the rest changes how vectors are compared or what may be loaded.
NOT_HASHED = frozenset(
    {
        "model",
        "revision",
        "base",
        "trust_remote_code",
        "allow_pickle",
        "method",
        "role",
        "similarity",
    }
)
# Of a generator: its digests identify it.
_GENERATOR_NOT_HASHED = frozenset({"model", "revision"})
# As the digests of a generator's files are named.
_GENERATOR = "generator/"


def fingerprint(recipe: Recipe, digests: Mapping[str, str]) -> str:
    """Return 64 hex digits for all that decides a vector's value; 12 of them name the folder."""
    as_before = {**VERSION_1, **LATER}
    knobs = {key: value for key, value in decisive(recipe).items() if value != as_before[key]}
    return fingerprint_of({"knobs": knobs, "digests": dict(digests)})


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """Return 64 hex digits of a document of plain JSON values."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Return the knobs that decide vectors, with one spelling for each meaning."""
    if recipe.dtype == "auto":
        raise ValueError("the recipe is not resolved: dtype is still auto")
    knobs = recipe.model_dump(mode="json", exclude=set(NOT_HASHED))
    # The digests identify the adapters and their order, as they do the model.
    knobs["adapters"] = []
    special = knobs.pop("special_tokens")
    if special["eos"] == "none":
        special["eos_id"] = None
    if special["bos"] == "literal":
        special["bos"] = "none"
    knobs |= {f"special_tokens.{key}": value for key, value in special.items()}
    knobs["templates"] = _templates(recipe)
    knobs |= _unused_slots(knobs, recipe)
    knobs["span"] = _span(recipe)
    # Only written keys, as in a template's segments; the order of interventions changes nothing.
    given = [one.model_dump(mode="json", exclude_defaults=True) for one in recipe.interventions]
    knobs["interventions"] = sorted(given, key=canonical)
    # Only written keys: a later release may give heads more.
    knobs["heads"] = [one.model_dump(mode="json", exclude_defaults=True) for one in recipe.heads]
    if recipe.long_text != "truncate":
        knobs["truncation_side"] = "right"
    # Only written keys, and the rule of borders: before it had a name, borders were others.
    split = recipe.split.model_dump(mode="json", exclude_defaults=True)
    split["borders"] = recipe.split.borders
    knobs["split"] = split if recipe.long_text == "split" else {}
    knobs["generate"] = None if recipe.generate is None else _generation(recipe.generate)
    if recipe.decode is not None:
        knobs["decode"] = recipe.decode.model_dump(mode="json", exclude_defaults=True)
    if isinstance(recipe.layer, tuple) and len(recipe.layer) == 1:
        knobs["layer"] = recipe.layer[0]
    knobs["pooling"] = _pooling(recipe)
    knobs["finish"] = [
        {name: value for name, value in step.items() if value is not None}
        for step in knobs["finish"]
    ]
    return knobs


def generation_fingerprint(generation: Generation, digests: Mapping[str, str]) -> str:
    """Return 64 hex digits for all that decides what a generator makes of a text.

    `digests` are those of a recipe's models, the generator's among them.
    """
    own = {name: sha256 for name, sha256 in digests.items() if name.startswith(_GENERATOR)}
    return fingerprint_of({"generate": _generation(generation), "digests": own})


def text_projection(job_input: Input) -> str:
    """Return canonical text of all that decides which texts a chunk has."""
    joined = not isinstance(job_input.text, str)
    return canonical(
        {
            "text": job_input.text,
            "separator": job_input.separator if joined else None,
            "filter": job_input.filter,
        }
    )


def projection(job_input: Input, types: Mapping[str, str]) -> str:
    """Return canonical text of all that decides a file's rows; `types` names each column's type."""
    joined = not isinstance(job_input.text, str)
    sample = job_input.sample.model_dump() if isinstance(job_input, SampledInput) else None
    return canonical(
        {
            **({"sample": sample} if sample else {}),
            "text": job_input.text,
            "separator": job_input.separator if joined else None,
            "id": [job_input.id, types[job_input.id]] if job_input.id else None,
            "keep": [[name, types[name]] for name in job_input.keep],
            "filter": job_input.filter,
            "on_bad_row": job_input.on_bad_row,
            "schema": SCHEMA_VERSION,
        }
    )


def projected_types(projection: str) -> dict[str, str]:
    """Return the types' names by column, as `projection` was given them; none if it was edited."""
    try:
        document = json.loads(projection)
        pairs = [*document["keep"], *([document["id"]] if document["id"] else [])]
        return {str(name): str(kind) for name, kind in pairs}
    except (ValueError, KeyError, TypeError):
        return {}


def version(etag: str, fingerprint: str, projection: str) -> str:
    """Return 16 hex digits that change with the shard, the recipe and the projection."""
    return digest(canonical([etag, fingerprint, projection]))


def canonical(value: Any) -> str:
    """Return JSON with one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _generation(generation: Generation) -> dict[str, Any]:
    """Return what decides a generator's texts, with one spelling for each meaning."""
    knobs = generation.model_dump(mode="json", exclude=set(_GENERATOR_NOT_HASHED))
    if not generation.summaries:
        knobs["summary"] = None
    if not generation.temperature:
        knobs["top_p"] = 1.0
    return knobs


def _unused_slots(knobs: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return blanks for the values of slots that no template has."""
    blank: dict[str, Any] = {}
    templates = canonical(knobs["templates"])
    for auxiliary in auxiliary_templates(recipe.interventions).values():
        templates += canonical(auxiliary)
    if not _has(templates, "demonstrations"):
        blank |= {"demonstrations": [], "demonstration": None, "demonstrations_count": True}
    elif any(not isinstance(one, str) for one in recipe.demonstrations):
        templates += recipe.demonstration or ""
    else:
        blank["demonstration"] = None
    if not recipe.demonstrations:
        blank["demonstrations_count"] = True
    if not _has(templates, "instruction"):
        blank["instruction"] = None
    return blank


def _has(templates: str, slot: str) -> bool:
    return f"{{{slot}}}" in templates or f'"{slot}":' in templates


def _pooling(recipe: Recipe) -> Any:
    pooling = recipe.pooling
    if isinstance(pooling, WordWeights):
        # Only written keys; idf has no use for `a`.
        unread = {"a"} if pooling.idf else None
        return pooling.model_dump(mode="json", exclude_defaults=True, exclude=unread)
    written = recipe.model_dump(mode="json", include={"pooling"})["pooling"]
    return written[0] if isinstance(pooling, tuple) and len(pooling) == 1 else written


def _span(recipe: Recipe) -> Any:
    span = recipe.span
    if isinstance(span, SpanTag):
        return ["tag", span.tag, span.offset]
    if isinstance(span, SpanOffset) and span.alone:
        return ["alone", span.rule, span.offset]
    if isinstance(span, SpanOffset):
        return [span.rule, span.offset] if span.offset else span.rule
    return span


def _templates(recipe: Recipe) -> list[Any]:
    """Return templates, with their weights only where the aggregation uses them."""
    split = [
        (_template(one.template, one.join), one.weight)
        if isinstance(one, WeightedTemplate)
        else (_template(one, "joint"), 1.0)
        for one in recipe.templates
    ]
    if recipe.aggregation == "weighted":
        return [[template, weight] for template, weight in split]
    return [template for template, _ in split]


def _template(template: str | tuple[Segment, ...], join: str) -> Any:
    if isinstance(template, str):
        return template
    # Only written keys: a later release may give segments more.
    segments = [one.model_dump(mode="json", exclude_defaults=True) for one in template]
    return segments if join == "joint" else {join: segments}
