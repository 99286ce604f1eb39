import json

import pytest

from embedjob.job.result import Outcomes, RunFacts, summarize
from tests.job.outcomes import outcome

FACTS = RunFacts(
    chunks_planned=5, chunks_done_before=2, seconds=10.0, fingerprint="f" * 64, snapshot="s.json"
)


def test_a_summary_adds_up_what_was_committed() -> None:
    said = summarize(Outcomes([outcome("a"), outcome("b"), outcome("c", fault="lost")]), FACTS)
    assert (said.rows, said.embedded, said.deduplicated) == (20, 12, 4)
    assert (said.quarantined, said.nulls, said.truncated) == (2, 2, 6)
    assert said.rows == (
        said.embedded + said.reused + said.deduplicated + said.nulls + said.quarantined
    )
    assert (said.chunks_planned, said.chunks_done_before) == (5, 2)
    assert (said.chunks_written, said.chunks_failed) == (2, 1)
    assert (said.tokens, said.tokens_per_second, said.vectors) == (100, 10.0, 12)
    assert said.padding_share == pytest.approx(1 - 100 / 160)
    assert said.time_share == {"wait": 0.25, "tokenize": 0.25, "compute": 0.5, "copy": 0.0}


def test_utilization_is_of_the_chunks_whose_device_is_known() -> None:
    known = {"model_flops": 3e12, "peak_flops": 10e12, "copy_seconds": 4.0}
    said = summarize(Outcomes([outcome("a"), outcome("b", stats=known)]), FACTS)
    assert said.flops_utilization == pytest.approx(0.3)
    assert said.time_share == {
        "wait": 0.1667,
        "tokenize": 0.1667,
        "compute": 0.3333,
        "copy": 0.3333,
    }
    assert summarize(Outcomes([outcome("a")]), FACTS).flops_utilization is None


def test_a_run_without_work_divides_by_nothing() -> None:
    said = summarize(Outcomes(), RunFacts(0, 0, 0.0, "f" * 64))
    assert (said.rows, said.tokens_per_second, said.padding_share) == (0, 0.0, 0.0)
    assert set(said.time_share.values()) == {0.0}
    assert said.snapshot is None


def test_a_summary_is_plain_json_with_the_promised_keys() -> None:
    promised = """rows embedded reused deduplicated nulls quarantined files_not_read
        not_read rows_before
        shards_added shards_changed shards_removed vectors chunks_planned
        chunks_done_before chunks_written chunks_failed tokens prefix_tokens_saved padding_share
        truncated seconds tokens_per_second flops_utilization time_share fingerprint snapshot
        generated generated_tokens generations_reused generation_fallbacks chunks_left
        shards_left passages passages_reused"""
    document = json.loads(json.dumps(summarize(Outcomes([outcome("a")]), FACTS).as_dict()))
    assert sorted(document) == sorted(promised.split())
    assert sorted(document["time_share"]) == ["compute", "copy", "tokenize", "wait"]
