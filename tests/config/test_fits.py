"""Fits as config values: each kind, and what fits and the recipe must keep of each other.

Covers: embedjob.config.fits.fit_kinds, embedjob.config.fits.fit_rules
"""

import re
from pathlib import Path
from typing import Any

import pytest

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.fits.fit_rules import views_once_fitted
from embedjob.config.heads import Continuations
from embedjob.config.job import Input, Job, SampledInput
from embedjob.config.job_file import JobSource, job_source, merge, validate, validate_partial
from embedjob.config.pooling import FitStep
from embedjob.errors import ConfigError

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
WHITEN = {"kind": "whiten", "name": "w", "dimensions": 3}
STEPS = {"finish": [{"whiten": "w"}, {"normalize": True}]}


def source(fit: Any, encoder: Any = STEPS, **job_input: Any) -> JobSource:
    document = {
        "input": {"path": "in", "text": "t", **job_input},
        "encoder": {"model": "m", **encoder},
        "output": {"path": "out"},
        "fit": fit,
    }
    return job_source(document)


def job(fit: Any, encoder: Any = STEPS, **job_input: Any) -> Job:
    made = source(fit, encoder, **job_input)
    validate_partial(made)
    return validate(Job, merge(made.layers)[0])


def test_a_step_names_a_fit() -> None:
    made = job([WHITEN])
    [fit] = made.fit
    assert (fit.name, fit.dimensions, fit.sample, fit.seed, fit.source) == (
        "w",
        3,
        100_000,
        17,
        None,
    )
    step = made.encoder.finish[0]
    assert isinstance(step, FitStep)
    assert (step.kind, step.name) == ("whiten", "w")
    assert step.settled("0a").model_dump(exclude_none=True) == {"whiten": "0a"}


def test_every_row_and_another_output_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDJOB_TEST_OUT", "s3://other")
    [fit] = job([{**WHITEN, "sample": None, "from": "${EMBEDJOB_TEST_OUT}/out"}]).fit
    assert (fit.sample, fit.source) == (None, "s3://other/out")


@pytest.mark.parametrize("nothing", [None, []])
def test_a_job_may_have_none(nothing: Any) -> None:
    assert job(nothing, {}).fit == ()


def test_each_kind_of_a_step_is_a_key_of_finishing_steps() -> None:
    assert {kind for kind, one in FITS.items() if one.is_step} == {*FitStep.model_fields}


def test_the_docs_list_every_kind_and_say_which_serve_a_step() -> None:
    table = OPERATIONS.partition("| Kind | Gives | Serves a step |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (yes|no)\b[^|]*\|$", table, re.MULTILINE)
    assert dict(rows) == {kind: "yes" if one.is_step else "no" for kind, one in FITS.items()}


SCORED = {"heads": [{"continuations": "fit:c"}], "aggregation": "concat", "finish": []}


def test_a_head_names_a_fit_of_continuations() -> None:
    made = job([{"kind": "continuations", "name": "c", "sample": 3, "count": 2}], SCORED)
    assert made.encoder.continuations_fit == "c"
    assert made.encoder.views == 1
    assert views_once_fitted(made.encoder, made.fit) == 6
    [head] = made.encoder.heads
    assert isinstance(head, Continuations)
    settled = made.encoder.model_copy(update={"heads": (head.settled([(1, 2), (3,)]),)})
    assert (settled.continuations_fit, settled.views) == (None, 2)
    assert views_once_fitted(settled, made.fit) == 2


REFUSED = {
    "an unknown kind": ([{**WHITEN, "kind": "whitten"}], STEPS, "fit.0: got .* kind is one of whi"),
    "no kind": ([{"name": "w"}], STEPS, "kind is one of whiten, pca"),
    "an unknown key": (
        [{**WHITEN, "dimension": 2}],
        STEPS,
        "fit.0.dimension: unknown key dimension; allowed are name, from, .*did you mean dimensions",
    ),
    "no name": ([{"kind": "whiten"}], STEPS, "fit.0.name: is required"),
    "text for a number": ([{**WHITEN, "dimensions": "3"}], STEPS, 'fit.0.dimensions: got "3"'),
    "no dimensions": ([{**WHITEN, "dimensions": 0}], STEPS, "fit.0.dimensions: got 0"),
    "no rows": ([{**WHITEN, "sample": 0}], STEPS, "fit.0.sample: got 0"),
    "a mapping": ({"whiten": 1}, STEPS, "fit: got .* allowed is a valid array"),
    "a name that nobody makes": (
        [WHITEN],
        {"finish": [{"whiten": "v"}]},
        "encoder.finish: whiten: got v, but fit: makes w; add {kind: whiten, name: v} to fit:",
    ),
    "no fit at all": ([], STEPS, "got w, but fit: makes none"),
    "another kind": (
        [{"kind": "pca", "name": "w"}],
        STEPS,
        "got w, which is a fit of the kind pca; name a fit of the kind whiten",
    ),
    "a name twice": ([WHITEN, {**WHITEN, "kind": "pca"}], STEPS, "fit: got the name w twice"),
    "a step twice": (
        [WHITEN],
        {"finish": [{"whiten": "w"}, {"whiten": "w"}]},
        "got w twice; give each step its own fit",
    ),
    "a fit that nobody uses": (
        [WHITEN, {"kind": "pca", "name": "p"}],
        STEPS,
        "fit: p is used by no finishing step; add {pca: p} to encoder.finish",
    ),
    "two keys in a step": (
        [WHITEN],
        {"finish": [{"whiten": "w", "pca": "w"}]},
        "finish: a step has exactly one key; got whiten and pca, allowed is",
    ),
    "a step that is null": ([], {"finish": [{"pca": None}]}, "exactly one key; got none"),
    "no key in a step": ([], {"finish": [{}]}, "allowed is an object with one of the keys"),
    "a name with blanks": ([{**WHITEN, "name": "my fit"}], STEPS, "fit.0.name: got"),
    "a variable that is not set": (
        [{**WHITEN, "from": "${EMBEDJOB_TEST_UNSET}/x"}],
        STEPS,
        "fit.0.from: the environment variable EMBEDJOB_TEST_UNSET is not set",
    ),
    "ranges of floats": (
        [{"kind": "calibrate", "name": "r"}],
        {},
        "calibrate gives the ranges of int8 and uint8, got vector_dtype: float32",
    ),
    "ranges twice": (
        [{"kind": "calibrate", "name": "r"}, {"kind": "calibrate", "name": "s"}],
        {"vector_dtype": "int8"},
        "got calibrate twice, and an output has one set of ranges; leave one out",
    ),
    "a rotation of several vectors": (
        [{"kind": "align", "name": "a", "from": "old"}],
        {"aggregation": "keep"},
        "align takes one vector of each row, got aggregation: keep",
    ),
    "continuations that nobody samples": (
        [],
        {**SCORED, "heads": [{"continuations": "fit:c"}]},
        "heads: continuations: got fit:c, but the continuations that fit: samples are: none; add",
    ),
    "continuations that nobody scores": (
        [{"kind": "continuations", "name": "c"}],
        {},
        "fit: c samples continuations that no head scores; set heads: .*continuations: fit:c",
    ),
    "continuations after several templates": (
        [{"kind": "continuations", "name": "c"}],
        {**SCORED, "templates": ["{text}", "{text}!"]},
        "encoder.templates: got 2, and continuations are sampled after one",
    ),
    "continuations without room": (
        [{"kind": "continuations", "name": "c", "max_new_tokens": 64}],
        {**SCORED, "max_tokens": 64},
        "fit: c: got max_new_tokens: 64, but a text and a continuation have encoder.max_tokens: 64",
    ),
    "continuations of no length": (
        [{"kind": "continuations", "name": "c", "max_new_tokens": 0}],
        SCORED,
        "fit.0.max_new_tokens: got 0",
    ),
    "a rotation to nowhere": ([{"kind": "align", "name": "a"}], {}, "fit.0.from: is required"),
    "a secret": (
        [{**WHITEN, "from": "s3://user:word@bucket/x"}],
        STEPS,
        "fit.0.from: got credentials",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    fit, encoder, words = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        job(fit, encoder)
    assert re.search(words, str(refused.value), re.DOTALL), refused.value


def test_a_method_may_yet_bring_the_steps() -> None:
    validate_partial(source([WHITEN], {"method": "mean"}))


def test_no_job_file_asks_for_a_sample_of_its_input() -> None:
    with pytest.raises(ConfigError, match="unknown key sample"):
        job([], {}, sample={"seed": 1, "chunks": 1, "rows": 1})
    assert issubclass(SampledInput, Input)
