import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from embedjob.config.recipe import Recipe
from embedjob.errors import OutputError
from embedjob.output.claim import (
    Claim,
    Probes,
    check_claims,
    check_probes,
    put_claim,
    read_claims,
)
from embedjob.storage.objects import create, read_bytes

PROBES = Probes(texts=["a", "b"], ids=[[1, 2], [3]], vectors=[[1.0, 0.0], [0.6, 0.8]])


def _claim(fingerprint: str = "a" * 64, *, chunk_rows: int = 100, **recipe: Any) -> Claim:
    return Claim(
        chunk_rows=chunk_rows,
        fingerprint=fingerprint,
        recipes={
            role: Recipe(model="m", role=role, **recipe).model_dump(mode="json")
            for role in ("document", "query")
        },
        digests={"model.safetensors": fingerprint[:8]},
        schema={"row": "uint32"},
        probes=PROBES,
        versions={"torch": "2.13.0"},
    )


def _check(
    claims: tuple[Claim, ...], ours: Claim, *, new_fingerprint: bool = False
) -> Claim | None:
    return check_claims(
        claims,
        fingerprint=ours.fingerprint,
        chunk_rows=ours.chunk_rows,
        recipes=ours.recipes,
        digests=ours.digests,
        new_fingerprint=new_fingerprint,
    )


def test_a_claim_is_put_once_and_read_back(any_out: str) -> None:
    assert read_claims(any_out) == ()
    ours = _claim()
    assert _check((), ours) is None
    assert put_claim(any_out, ours) == ours
    assert read_claims(any_out) == (ours,)
    again = replace(_claim(), token="another")
    assert put_claim(any_out, again) == ours
    assert _check(read_claims(any_out), again) == ours


def test_a_claim_is_readable_json(out: str) -> None:
    put_claim(out, _claim())
    document = json.loads(read_bytes(f"{out}/_embedjob.json"))
    assert document["format_version"] == 1
    assert document["recipes"]["query"]["model"] == "m"
    assert document["probes"]["ids"] == [[1, 2], [3]]


def test_another_fingerprint_is_refused_with_both_shown(out: str) -> None:
    put_claim(out, _claim())
    other = _claim("b" * 64, pooling="max", similarity="dot")
    with pytest.raises(OutputError) as refused:
        _check(read_claims(out), other)
    message = str(refused.value)
    assert message.count('  pooling: the output has "mean", this job has "max"') == 1
    assert 'sha256 of model.safetensors: the output has "aaaaaaaa", this job has "bb' in message
    assert "similarity" not in message
    assert "--new-fingerprint" in message
    with pytest.raises(OutputError, match="pooling"):
        put_claim(out, other)


def test_what_a_release_changed_is_refused_with_the_reason(out: str) -> None:
    instructions = ("Retrieve semantically similar text.", "Retrieve semantically similar text")
    then, now = (
        _claim(x * 64, method="nv_embed", instruction=i)
        for x, i in zip("ab", instructions, strict=True)
    )
    put_claim(out, then)
    with pytest.raises(OutputError, match=r"Changed in a release .*CHANGELOG\.md.*: nv_embed's"):
        _check(read_claims(out), now)
    with pytest.raises(OutputError) as refused:
        _check(read_claims(out), _claim("c" * 64, method="nv_embed", instruction="Find"))
    assert "CHANGELOG" not in str(refused.value)


def test_a_new_fingerprint_is_written_beside(any_out: str) -> None:
    first, second = _claim(), _claim("b" * 64, pooling="max")
    put_claim(any_out, first)
    assert _check(read_claims(any_out), second, new_fingerprint=True) is None
    assert put_claim(any_out, second, new_fingerprint=True) == second
    assert put_claim(any_out, replace(second, token="t"), new_fingerprint=True) == second
    assert read_claims(any_out) == (first, second)
    assert put_claim(any_out, replace(second, token="later")) == second
    assert _check(read_claims(any_out), first) == first
    assert _check(read_claims(any_out), second) == second


def test_another_chunk_rows_is_refused_with_its_cost(out: str) -> None:
    put_claim(out, _claim())
    for new_fingerprint in (False, True):
        with pytest.raises(
            OutputError,
            match=r"got 50, but this output was started with 100.*embedded and stored again",
        ):
            _check(read_claims(out), _claim(chunk_rows=50), new_fingerprint=new_fingerprint)


def test_of_two_recipes_at_once_one_wins(any_out: str) -> None:
    claims = [_claim(letter * 64) for letter in "abcd"]

    def put(claim: Claim) -> Claim | None:
        try:
            return put_claim(any_out, claim)
        except OutputError:
            return None

    with ThreadPoolExecutor(4) as pool:
        winners = [stands for stands in pool.map(put, claims) if stands]
    assert tuple(winners) == read_claims(any_out)
    assert len(winners) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"oops", "not JSON"),
        (b"{}", "format version None"),
        (b'{"format_version": 1}', "no.* claim"),
    ],
)
def test_what_is_no_claim_is_refused(out: str, content: bytes, message: str) -> None:
    create(f"{out}/_embedjob.json", content)
    with pytest.raises(OutputError, match=message):
        read_claims(out)


def test_probes_that_are_reproduced_pass() -> None:
    check_probes(_claim(), ids=PROBES.ids, vectors=[[1.0, 1e-3], [0.6, 0.8]], dtype="float32")
    check_probes(_claim(), ids=PROBES.ids, vectors=[[1.0, 0.03], [0.6, 0.8]], dtype="bfloat16")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 0.03], [0.6, 0.8]], r"cosine of 0\.99955\d for 'a'"),
        ([[1.0, 0.0], [float("nan"), 0.8]], "cosine of nan for 'b'"),
        ([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]], "cosine of 0.000000 for 'a'"),
    ],
)
def test_vectors_that_moved_are_refused(vectors: list[list[float]], message: str) -> None:
    with pytest.raises(OutputError, match=message):
        check_probes(_claim(), ids=PROBES.ids, vectors=vectors, dtype="float32")


def test_token_ids_that_moved_are_refused_and_the_versions_named() -> None:
    with pytest.raises(OutputError, match=r"gives \[4\] for 'b', but gave \[3\].*torch 2\.13\.0"):
        check_probes(_claim(), ids=[[1, 2], [4]], vectors=PROBES.vectors, dtype="float32")


def test_a_probe_without_a_vector_has_none_in_every_run() -> None:
    """A table of words has nothing for a text in another language; a sketch may be zeros."""
    probes = Probes(PROBES.texts, [[], [3]], [[], [0.0, 0.0]])
    claim = replace(_claim(), probes=probes)
    check_probes(claim, ids=probes.ids, vectors=probes.vectors, dtype="float32")
    for vectors in ([[0.0], [0.0, 0.0]], [[], [0.0, 0.1]]):
        with pytest.raises(OutputError, match="the model gives other vectors"):
            check_probes(claim, ids=probes.ids, vectors=vectors, dtype="float32")
