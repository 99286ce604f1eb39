"""A job with fits, or generations, that stops at any moment is followed by one that makes the same.

Before and after each storage call in turn, on the local disk and on S3: the same artefacts, the
same generations and the same vectors; nothing is embedded or generated again once it was put.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from embedjob.input.decoders import decoders
from embedjob.job.options import Options
from embedjob.reports.verify import verify
from embedjob.storage import objects
from tests.output.job_worlds import Good, JobWorld, write_table

WHITEN = {"kind": "whiten", "name": "w", "dimensions": 3, "sample": 20}
TABLE, CHAT = {"model": "TABLE"}, {"model": "CHAT"}
WHITENED = {"finish": [{"whiten": "w"}, {"normalize": True}]}
GENERATE = {
    "kinds": {"shorter": {"instruction": "Say less."}, "longer": {"instruction": "Say more."}},
    "max_prompt_tokens": 100,
    "max_new_tokens": 5,
}
JOBS: dict[str, dict[str, Any]] = {
    "whiten": {"encoder": {**TABLE, **WHITENED}, "fit": [WHITEN]},
    "vocabulary": {"encoder": {"method": "tfidf"}},
    "kmeans": {
        "encoder": TABLE,
        "fit": [{"kind": "kmeans", "name": "k", "clusters": 3, "sample": None, "iterations": 2}],
    },
    "sif": {"encoder": {"method": "sif", **TABLE}},
    "calibrate": {
        "encoder": {**TABLE, "vector_dtype": "int8"},
        "fit": [{"kind": "calibrate", "name": "r", "sample": None}],
    },
    "generate": {"encoder": CHAT, "generate": GENERATE},
    "generate and whiten": {"encoder": {**CHAT, **WHITENED}, "fit": [WHITEN], "generate": GENERATE},
}
# One moment in so many; each in turn in `chaos`.
STRIDES = pytest.mark.parametrize(
    "stride",
    [
        71,
        pytest.param(1, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)]),
    ],
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Here alone: transformers would cost the tests that need no model five seconds.
    from tests.encoder.tiny import save_chat

    return save_chat(tmp_path_factory.mktemp("chat-model"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where tables are unpacked, and models fetched to."""
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))


def sections_of(name: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A job's sections, with the place of its model."""
    job = dict(JOBS[name])
    model = job["encoder"].get("model")
    if model == "TABLE":
        job["encoder"] = {**job["encoder"], "model": str(write_table(folder / "words.txt"))}
    elif model == "CHAT":
        job["encoder"] = {**job["encoder"], "model": str(request.getfixturevalue("chat"))}
        job["pool"] = {"actors": 1, "gpus_per_actor": 0}
    return job


def corpus(world: JobWorld) -> None:
    """Shards of 23 and of 14 rows, in chunks of five rows and of ten."""
    world.write("in/a", 23, 1)
    world.write("in/b", 14, 1)


def ended_well(world: JobWorld, **options: bool) -> None:
    ended = world.run(Options(**options))
    assert ended.code == 0, ended.error or ended.result
    world.look()
    world.check_success(ended)


def stopped_at_each_moment(
    sections: dict[str, Any], folder: Path, *, how: str, stride: int, root: str | None = None
) -> None:
    """A run that stops at a moment, and one after it, each time in a fresh output."""
    worlds = partial(JobWorld, sections=sections, inputs=folder / "inputs")
    with decoders(worlds(folder).decoded, files=1) as decode:
        good: Good = {}
        wanted: tuple[Any, ...] = ()
        moment, last = 0, 1
        while moment < last + stride:
            # One place for all inputs: it is part of what is hashed.
            world = worlds(folder / str(moment), out=f"{root}/{moment}" if root else None)
            world.good, world.decode = good, decode
            with world.running():
                if not good:
                    corpus(world)
                first = world.run(Options(), stop_at=moment or None, how=how)
                last = first.calls if moment == 0 else last
                world.look()
                ended_well(world)
                made = (world.artefacts(), world.generations(), world.vectors())
                wanted = wanted or made
                assert made == wanted, f"something else after moment {moment}"
                if how == "sleep" and first.asleep:
                    assert world.wake(0).code in (0, 1)
                    world.look()
                    assert (world.artefacts(), world.generations(), world.vectors()) == wanted
            moment += stride
    assert last > 100


@STRIDES
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("sif", "calibrate", "generate") else ()
        )
        for name in JOBS
    ],
)
def test_a_run_that_dies_at_any_moment_is_followed_by_one_that_makes_the_same(
    name: str, stride: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sections = sections_of(name, tmp_path, request)
    # A transformer takes its time, and more moments of its stages are tried beside this test.
    stride *= 3 if "generate" in sections and stride > 1 else 1
    stopped_at_each_moment(sections, tmp_path, how="die", stride=stride)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", ["whiten", pytest.param("generate and whiten", marks=pytest.mark.chaos)]
)
def test_what_one_that_slept_does_afterwards_harms_nobody(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sections = sections_of(name, tmp_path, request)
    stopped_at_each_moment(sections, tmp_path, how="sleep", stride=61)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        "whiten",
        "generate",
        *(pytest.param(n, marks=pytest.mark.chaos) for n in ("vocabulary", "kmeans")),
    ],
)
def test_the_same_holds_on_s3(
    name: str, bucket: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sections = sections_of(name, tmp_path, request)
    stopped_at_each_moment(sections, tmp_path, how="die", stride=97, root=f"{bucket}/out")


def test_a_fits_sample_is_generated_once_and_serves_the_run(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sections = sections_of("generate and whiten", tmp_path, request)
    world = JobWorld(tmp_path, sections, inputs=tmp_path / "inputs")
    with world.running():
        corpus(world)
        ended_well(world)
        # 35 good rows, all different; 20 of them are the sample.
        assert len(world.generated) == 35
        assert set(Counter(world.generated).values()) == {1}
        assert len(world.embedded) > len(set(world.embedded)) or len(world.embedded) > 7
        nested = [f for f in objects.list_files(world.out) if "/fits/" in f.url]
        assert any("/generations/" in file.url for file in nested)
        assert verify(world.out).problems == ()
        # A prune takes the sample's own, and none of the corpus'.
        before = {f.url for f in objects.list_files(f"{world.out}/generations")}
        world.prune()
        assert {f.url for f in objects.list_files(f"{world.out}/generations")} == before
        assert not any("/generations/" in f.url for f in objects.list_files(f"{world.out}/fits"))
        ended_well(world)
        assert len(world.generated) == 35


def test_a_run_before_serves_the_sample_of_a_fit_that_comes_later(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The vectors of int8 cannot be fitted, so that the sample is embedded, and not generated."""
    sections = sections_of("generate", tmp_path, request)
    sections["encoder"] = {**sections["encoder"], "vector_dtype": "binary"}
    world = JobWorld(tmp_path, sections, inputs=tmp_path / "inputs")
    with world.running():
        corpus(world)
        ended_well(world)
        assert len(world.generated) == 35
        fits = [{"kind": "kmeans", "name": "k", "clusters": 3, "sample": 20, "iterations": 2}]
        world.sections["fit"] = fits
        ended_well(world)
        assert len(world.generated) == 35
        assert [name for name in world.artefacts() if name.startswith("kmeans")]


def test_a_sample_has_so_many_of_the_rows_that_pass_the_filter(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whether its vectors are embedded for it, or are there already."""
    sections = sections_of("whiten", tmp_path, request)
    world = JobWorld(tmp_path, sections, inputs=tmp_path / "inputs")
    with world.running():
        corpus(world)
        # Of 37 rows, 25; the two bad ones are not among them.
        passing = [f"1-{row}" for row in range(3, 17)]
        world.sections["input"] = {
            "path": str(world.inputs / "in"),
            "text": "t",
            "id": "n",
            "filter": [["n", "in", passing]],
        }
        assert world.run(Options()).code == 0
        assert rows_of_artefact(world, "whiten") == 20
        # Fewer of what is served in float32, of which no vector is embedded.
        before = len(world.embedded)
        fits = [{"kind": "kmeans", "name": "k", "clusters": 3, "sample": 9, "iterations": 2}]
        world.sections["fit"] = [*world.sections["fit"], *fits]
        assert world.run(Options()).code == 0
        assert rows_of_artefact(world, "kmeans") == 9
        assert len(world.embedded) == before


def rows_of_artefact(world: JobWorld, kind: str) -> int:
    """How many vectors the one artefact of a kind was computed from."""
    [place] = Path(world.out, "artefacts").glob(f"{kind}-*.json")
    return int(json.loads(place.read_text())["rows"])


@pytest.mark.parametrize("what", ["damaged", "gone"])
@pytest.mark.parametrize("name", ["vocabulary", "kmeans", "sif"])
def test_verify_names_what_is_wrong_with_an_artefact_that_is_no_step(
    name: str, what: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = {"sif": "word_counts"}.get(name, name)
    sections = sections_of(name, tmp_path, request)
    world = JobWorld(tmp_path, sections, inputs=tmp_path / "inputs")
    with world.running():
        corpus(world)
        ended_well(world)
        assert verify(world.out).problems == ()
        [path] = Path(world.out, "artefacts").glob(f"{kind}-*.safetensors")
        spoil(path, what)
        [problem] = verify(world.out).problems
        assert str(path) in problem
        assert ("is missing" if what == "gone" else "another sha256") in problem


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_verify_names_the_vocabulary_of_an_older_recipe_too(
    what: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sections = sections_of("vocabulary", tmp_path, request)
    world = JobWorld(tmp_path, sections, inputs=tmp_path / "inputs")
    with world.running():
        corpus(world)
        ended_well(world)
        [path] = Path(world.out, "artefacts").glob("vocabulary-*.safetensors")
        world.write("in/c", 9, 1)
        ended_well(world, refit=True, new_fingerprint=True)
        assert verify(world.out).problems == ()
        spoil(path, what)
        [problem] = verify(world.out).problems
        assert str(path) in problem


def spoil(path: Path, what: str) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if what == "damaged":
        path.write_bytes(content)
