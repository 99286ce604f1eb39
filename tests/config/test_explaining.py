"""What is wrong in a job, by the key that is written, with what is allowed there."""

from typing import Any

import pytest

from embedjob.config.job_file import job_source, validate_partial
from embedjob.errors import ConfigError

WHITEN = {"kind": "whiten", "name": "w"}
SAID: dict[str, tuple[dict[str, Any], str]] = {
    "a key of a section": (
        {"run": {"untill": "06:00"}},
        "run.untill: unknown key untill; allowed are limit, .*; did you mean until?",
    ),
    "a key of a section in a section": (
        {"input": {"path": "in", "text": "t", "table": {"format": "delta", "uris": "x"}}},
        "input.table.uris: unknown key uris; allowed are format, uri, .*did you mean uri",
    ),
    "a key of a generator's pool": (
        {"generate": {"kind": "rephrase", "pool": {"actor": 1}}},
        "generate.pool.actor: unknown key actor; allowed are actors, .*did you mean actors",
    ),
    "a value of a head": (
        {"encoder": {"heads": [{"router": {"scores": "logit"}}]}},
        "encoder.heads.0.router.scores: got \"logit\", allowed is 'logits' or 'softmax'",
    ),
    "a key beside a head that has a key of its name": (
        {"encoder": {"heads": [{"router": {"join": "x"}, "join": "concat"}]}},
        'heads.0.router.join: got "x".*\n.*heads.0.join: unknown key join; allowed are router',
    ),
    "a head by its second name": (
        {"encoder": {"heads": [{"anchors": 3}]}},
        "encoder.heads.0.anchors: got 3, allowed is fit:NAME",
    ),
    "a key of a head": (
        {"encoder": {"heads": [{"sparse_lm": {"word": 1}}]}},
        "heads.0.sparse_lm.word: unknown key word; allowed are words, .*did you mean words",
    ),
    "two heads in one": (
        {"encoder": {"heads": [{"pooler": True, "dense": "x"}]}},
        "heads.0.dense: got pooler and dense together; write each as an entry of its own",
    ),
    "a step of one of several keys": (
        {"encoder": {"finish": [{"standardize": 3}]}},
        "encoder.finish.0.standardize: got 3, allowed is a valid string",
    ),
    "a weight of a template": (
        {"encoder": {"templates": [{"template": "{text}", "weight": 0}]}},
        r"^encoder.templates.0.weight: got 0, allowed is greater than 0[^\n]*$",
    ),
    "a key of another kind of fit": (
        {"fit": [{**WHITEN, "clusters": 3}]},
        "fit.0.clusters: unknown key clusters; allowed are name, from, sample, seed, kind, dim",
    ),
    "a value of a fit": (
        {"fit": [{**WHITEN, "dimensions": 0}]},
        "fit.0.dimensions: got 0, allowed is greater than or equal to 1",
    ),
    "a kind that is no text": (
        {"fit": [{**WHITEN, "kind": ["pca"]}]},
        r"fit.0: got .*, allowed is an object whose kind is one of whiten, pca",
    ),
}


@pytest.mark.parametrize(("written", "said"), SAID.values(), ids=SAID)
def test_it_is_named_by_its_own_key(written: dict[str, Any], said: str) -> None:
    job = {"input": {"path": "in", "text": "t"}, "output": {"path": "out"}, **written}
    source = job_source({**job, "encoder": {"model": "m", **written.get("encoder", {})}})
    with pytest.raises(ConfigError, match=said):
        validate_partial(source)
