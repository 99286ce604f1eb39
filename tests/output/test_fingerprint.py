"""Every key of the config either changes the name of a chunk's file or does not: all decided."""

from collections.abc import Iterator
from typing import Any, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.config.fits.fit_kinds import Kmeans
from embedjob.config.generation import Generation, Transformation
from embedjob.config.heads import (
    Continuations,
    Decode,
    Dense,
    LayerNorm,
    Pooler,
    RouterHead,
    RouterScores,
    SparseHead,
    SparseLm,
)
from embedjob.config.interventions import Contrast, Contrasting, Prepend, Prepending
from embedjob.config.job import ActorRange, Generate, Input, InputTable, Job, Output
from embedjob.config.pooling import Normalize, SpanOffset, SpanTag, Truncate, WeightedFrom
from embedjob.config.recipe import Recipe, SpecialTokens, Split
from embedjob.config.segments import Demonstration, Segment, Slot, WeightedTemplate
from embedjob.config.types import Section
from embedjob.output.fingerprint import (
    LATER,
    NOT_HASHED,
    VERSION_1,
    decisive,
    fingerprint,
    projection,
    version,
)

DIGESTS = {"model.safetensors": "a1", "tokenizer.json": "b2"}
TYPES = {"doc": "large_string", "lang": "large_string", "url": "large_string", "n": "int64"}
JOB = Job(
    input=Input(path="/in", text=("title", "body"), id="doc", keep=("lang",)),
    encoder=Recipe(
        model="m",
        dtype="float32",
        templates=("{instruction}: {text}", "{text}"),
        special_tokens=SpecialTokens(eos="append"),
    ),
    output=Output(path="/out"),
)

PREPENDING = Prepending(prepend=Prepend(slot="<x>", start=1, exit=3))
CONTRASTING = Contrasting(contrast=Contrast(template="Not {text}", layer=4, alpha=2.0))

# One other value for every key that decides rows or vectors.
CHANGES: dict[str, Any] = {
    "input.text": ("body", "title"),
    "input.separator": " ",
    "input.id": "n",
    "input.keep": ("url",),
    "input.filter": (("n", ">", 1),),
    "input.on_bad_row": "null",
    "encoder.instruction": "Summarize",
    "encoder.prepare": "eol",
    "encoder.templates": ("{text}!", "{text}"),
    "encoder.special_tokens.bos": "none",
    "encoder.special_tokens.eos": "none",
    "encoder.special_tokens.eos_id": 2,
    "encoder.special_tokens.add": ("<x>",),
    "encoder.attention": "bidirectional",
    "encoder.layer": -2,
    "encoder.span": "last_token",
    "encoder.pooling": "max",
    "encoder.aggregation": "concat",
    "encoder.interventions": (PREPENDING,),
    "encoder.heads": (Dense(dense="2_Dense"),),
    "encoder.finish": (Truncate(truncate=8), Normalize(normalize=True)),
    "encoder.vector_dtype": "float16",
    "encoder.max_tokens": 64,
    "encoder.truncation_side": "left",
    "encoder.long_text": "bad",
    "encoder.decode": Decode(),
    "encoder.dtype": "bfloat16",
    "encoder.quantize": "int8",
    "encoder.word_cut": 400,
    "encoder.generate": Generation(kinds={"shorter": Transformation(instruction="Say less.")}),
}
# One other value for every key that decides neither.
KEEPS: dict[str, Any] = {
    "input.path": "/elsewhere",
    "input.table": InputTable(format="delta", uri="/elsewhere"),
    "encoder.model": "/copies/m",
    "encoder.revision": "abc",
    "encoder.base": "/copies/base",
    "encoder.adapters": ("/copies/a",),
    "encoder.trust_remote_code": True,
    "encoder.allow_pickle": True,
    "encoder.method": "prompteol",
    "encoder.role": "query",
    "encoder.similarity": "dot",
    # What of it decides vectors is put into the recipe.
    "generate": Generate(count=2),
    "pool.actors": ActorRange(max=3),
    "pool.gpus_per_actor": 0,
    "pool.cpus_per_actor": 2,
    "pool.tokens_per_microbatch": 64,
    "output.path": "/other",
    "output.chunk_rows": 7,
    "output.compression": "none",
    "output.reuse_from": ("/old",),
    "output.vector_list": "variable",
    "run.limit": 5,
    "run.max_quarantined": 0.5,
    "run.max_shrink": 0.5,
    "run.until": "90m",
    "run.wait_for_resources": "1m",
    "run.stall_seconds": 1,
    # What it makes is hashed where a finishing step names it.
    "fit": (Kmeans(kind="kmeans", name="k", clusters=2),),
}
# They decide vectors if a template has a slot for them, and are decided in a test of their own.
SLOTTED = {
    "encoder.demonstrations",
    "encoder.demonstration",
    "encoder.demonstrations_count",
}
# They decide passages where texts are split, in a test of their own too.
SPLIT = {f"encoder.split.{key}" for key in ("max_tokens", "overlap", "carry", "borders")}


def _leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _changed(section: Section, path: str, value: Any) -> Any:
    key, _, rest = path.partition(".")
    inner = _changed(getattr(section, key), rest, value) if rest else value
    assert inner != getattr(section, key)
    return section.model_copy(update={key: inner})


def _version(job: Job, etag: str = "e") -> str:
    return version(etag, fingerprint(job.encoder, DIGESTS), projection(job.input, TYPES))


def test_every_key_is_decided() -> None:
    assert sorted([*CHANGES, *KEEPS, *SLOTTED, *SPLIT]) == sorted(_leaves(Job))


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_decides_rows_or_vectors_changes_the_name(key: str) -> None:
    assert _version(_changed(JOB, key, CHANGES[key])) != _version(JOB)


@pytest.mark.parametrize("key", KEEPS)
def test_any_other_key_does_not(key: str) -> None:
    assert _version(_changed(JOB, key, KEEPS[key])) == _version(JOB)


@given(st.sets(st.sampled_from(sorted(CHANGES))), st.sets(st.sampled_from(sorted(KEEPS))))
def test_many_changes_at_once(decide: set[str], others: set[str]) -> None:
    job = JOB
    for key in decide | others:
        job = _changed(job, key, {**CHANGES, **KEEPS}[key])
    assert (_version(job) == _version(JOB)) == (not decide)


def test_the_etag_the_digests_and_the_types_count_too() -> None:
    assert _version(JOB, etag="other") != _version(JOB)
    assert fingerprint(JOB.encoder, {**DIGESTS, "tokenizer.json": "c"}) != fingerprint(
        JOB.encoder, DIGESTS
    )
    assert fingerprint(JOB.encoder, dict(reversed(DIGESTS.items()))) == fingerprint(
        JOB.encoder, DIGESTS
    )
    assert projection(JOB.input, TYPES) != projection(JOB.input, {**TYPES, "lang": "int64"})
    assert projection(JOB.input, TYPES) == projection(JOB.input, {**TYPES, "n": "int8"})


def _recipe(**knobs: Any) -> Recipe:
    return Recipe(**{"model": "m", "dtype": "float32", **knobs})


SEGMENTS = (Segment(literal="x"), Segment(text=Slot(pool=True)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"span": SpanOffset(rule="text", offset=0)}, {"span": "text"}),
        ({"layer": (-1,)}, {"layer": -1}),
        ({"pooling": ("max",)}, {"pooling": "max"}),
        ({"instruction": "unused"}, {}),
        ({"special_tokens": SpecialTokens(eos_id=7)}, {}),
        ({"templates": (WeightedTemplate(template="{text}", weight=3.0),)}, {}),
        (
            {"special_tokens": SpecialTokens(bos="literal")},
            {"special_tokens": SpecialTokens(bos="none")},
        ),
        (
            {"interventions": (PREPENDING, CONTRASTING)},
            {"interventions": (CONTRASTING, PREPENDING)},
        ),
        ({"demonstrations": ("unused",), "demonstration": "{text}"}, {}),
        ({"demonstrations": ("unused",), "demonstrations_count": False}, {}),
        ({"quantize": "none"}, {}),
        (
            {"templates": ("{demonstrations}{text}",), "demonstrations_count": False},
            {"templates": ("{demonstrations}{text}",)},
        ),
        (
            {"templates": ("{demonstrations}{text}",), "demonstrations": ("x",)},
            {
                "templates": ("{demonstrations}{text}",),
                "demonstrations": ("x",),
                "demonstration": "unused",
            },
        ),
        (
            {"templates": (WeightedTemplate(template=SEGMENTS),)},
            {"templates": (SEGMENTS,)},
        ),
    ],
)
def test_two_spellings_of_one_meaning_are_one(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert fingerprint(_recipe(**one), DIGESTS) == fingerprint(_recipe(**other), DIGESTS)


def test_a_split_decides_where_texts_are_split_and_nowhere_else() -> None:
    others = [Split(max_tokens=200), Split(overlap=20), Split(carry=("title",))]
    for long_text in ("truncate", "late_chunk"):
        plain = fingerprint(_recipe(long_text=long_text), DIGESTS)
        for other in others:
            assert fingerprint(_recipe(long_text=long_text, split=other), DIGESTS) == plain
    split = [_recipe(long_text="split", split=one) for one in (Split(), *others)]
    found = {fingerprint(one, DIGESTS) for one in [*split, _recipe(), _recipe(long_text="bad")]}
    assert len(found) == len(split) + 2
    written = _recipe(long_text="split", split=Split(max_tokens=400, overlap=0, carry=()))
    assert fingerprint(written, DIGESTS) == fingerprint(split[0], DIGESTS)
    # By this name passages of another rule have another fingerprint.
    assert decisive(split[0])["split"] == {"borders": "landmarks"}


def test_what_looks_alike_and_is_not() -> None:
    weighted = [
        _recipe(
            aggregation="weighted", templates=(WeightedTemplate(template="{text}", weight=weight),)
        )
        for weight in (1.0, 2.0)
    ]
    moved = [
        _recipe(span=SpanOffset(rule="text", offset=offset, alone=alone))
        for offset in (0, 1, 2)
        for alone in (False, True)
    ]
    segments = [
        _recipe(templates=(WeightedTemplate(template=template, join=join),))
        for template in (SEGMENTS, (Segment(literal="x"), Segment(text=Slot())))
        for join in ("joint", "separate")
    ]
    tagged = [
        _recipe(span=SpanTag(tag=tag, offset=at)) for tag, at in (("a", 0), ("b", 0), ("a", 1))
    ]
    slots = ("{demonstrations}{text}",)
    counted = [
        _recipe(templates=slots, demonstrations=("x",), demonstrations_count=counts)
        for counts in (True, False)
    ]
    shown = [
        _recipe(templates=slots, demonstrations=given, demonstration=pattern)
        for given, pattern in [
            ((), None),
            (("a",), None),
            ((Demonstration(text="a", answer="b"),), "{text}"),
            ((Demonstration(text="a", answer="b"),), "{text} {answer}"),
        ]
    ]
    pooled = [
        _recipe(pooling=pooling)
        for pooling in (
            *("mean", "max", "mean_sqrt_len", "latent_attention", ("mean", "max")),
            *("weighted_mean", WeightedFrom(weighted_mean=1), WeightedFrom(weighted_mean=2)),
        )
    ]
    headed = [
        _recipe(heads=heads)
        for heads in (
            (Dense(dense="2_Dense"),),
            (Dense(dense="3_Dense"),),
            (LayerNorm(layer_norm="2_Dense"),),
            (Pooler(pooler=True),),
            (Dense(dense="2_Dense"), Normalize(normalize=True)),
            (Normalize(normalize=True), Dense(dense="2_Dense")),
        )
    ]
    prepended = [
        _recipe(interventions=(Prepending(prepend=PREPENDING.prepend.model_copy(update=change)),))
        for change in ({}, {"slot": "<y>"}, {"start": 0}, {"exit": 4}, {"seed": 1})
    ]
    contrasted = [
        _recipe(interventions=(Contrasting(contrast=CONTRASTING.contrast.model_copy(update=new)),))
        for new in ({}, {"layer": 5}, {"alpha": 1.0}, {"mode": "norm", "alpha": None})
    ]
    slotted = Contrasting(
        contrast=Contrast(template="{instruction} {demonstrations}{text}", layer=4, alpha=2.0)
    )
    contrasted += [
        _recipe(interventions=(slotted,), **filled)
        for filled in (
            {},
            {"instruction": "Not this"},
            {"instruction": "Not that"},
            {"demonstrations": ("a",)},
            {"demonstrations": ("b",)},
        )
    ]
    steered = (*prepended, *contrasted)
    every = (*pooled, *headed, *weighted, *moved, *segments, *tagged, *shown, *counted, *steered)
    found = {fingerprint(recipe, DIGESTS) for recipe in every}
    assert len(found) == len(every)


def test_a_separator_that_joins_nothing_says_nothing() -> None:
    one = Input(path="p", text="body")
    assert projection(one, {}) == projection(one.model_copy(update={"separator": "x"}), {})


def test_an_unresolved_recipe_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="dtype is still auto"):
        fingerprint(Recipe(model="m"), DIGESTS)


def test_every_knob_has_a_value_that_means_as_before() -> None:
    assert decisive(_recipe()).keys() == {*VERSION_1, *LATER}
    assert not NOT_HASHED & {*VERSION_1, *LATER}


class _RecipeOfALaterRelease(Recipe):
    new_knob: str = "as before"
    max_tokens: int = 1024


def test_a_new_knob_or_default_changes_nobodys_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embedjob.output.fingerprint.LATER", {**LATER, "new_knob": "as before"})
    written = _recipe(pooling="max").model_dump()
    later = _RecipeOfALaterRelease.model_validate(written, strict=False)
    assert fingerprint(later, DIGESTS) == fingerprint(_recipe(pooling="max"), DIGESTS)
    used = later.model_copy(update={"new_knob": "other"})
    assert fingerprint(used, DIGESTS) != fingerprint(later, DIGESTS)


# A fingerprint that changes makes every user embed everything again. Never edit these.
GOLDEN = {
    "defaults": (_recipe(), "888e496aa4d5"),
    "prompteol": (
        _recipe(
            templates=('This sentence : "{text}" means in one word:"',),
            span="last_token",
            dtype="bfloat16",
        ),
        "68e674105f79",
    ),
    "job": (JOB.encoder, "c563b767cdbf"),
    "interventions": (_recipe(interventions=(PREPENDING, CONTRASTING)), "21ee4ad64623"),
    "int8": (_recipe(quantize="int8"), "69fa8236a349"),
    "continuations": (
        _recipe(
            aggregation="concat",
            heads=(Continuations.model_validate({"continuations": (" a", " b")}),),
        ),
        "1df516dd6c8b",
    ),
    "beside the vector": (
        _recipe(
            heads=(
                SparseHead(sparse_lm=SparseLm(words="text")),
                RouterHead(router=RouterScores()),
            )
        ),
        "cf20d46da232",
    ),
    "decode": (_recipe(span="last_token", decode=Decode(max_tokens=3, until="x")), "ed28ee4539fd"),
    "modules": (_recipe(heads=(Pooler(pooler=True), Dense(dense="2_Dense"))), "b54b4f6a4f31"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_fingerprints_stay_what_they_were(name: str) -> None:
    recipe, pinned = GOLDEN[name]
    assert fingerprint(recipe, DIGESTS)[:12] == pinned


def test_the_projection_stays_what_it_was() -> None:
    assert version("e", "f" * 64, projection(JOB.input, TYPES)) == "1f9962f67a3d4aec"
