"""A run with fits that dies or sleeps at any moment is followed by one that makes the same."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from embedjob.config.fits.fit_kinds import Pca, Standardize
from embedjob.config.job_file import JobSource
from embedjob.config.pooling import FitStep
from embedjob.config.recipe import Recipe
from embedjob.input.chunks import Chunk
from embedjob.input.listing import check_apart
from embedjob.job.input_listing import list_input
from embedjob.job.options import Options
from embedjob.job.planning import JobPlan, plan_settled
from embedjob.job.result import Outcome
from embedjob.output.claim import read_claims
from embedjob.output.file_names import parse_name
from embedjob.output.fits.records import read_records
from embedjob.output.snapshot import newest_snapshot
from embedjob.reports.verify import verify
from embedjob.stages.fits import fit
from embedjob.stages.fits import reduce as reducing
from embedjob.storage import objects
from tests.output.worlds import World
from tests.shards import WIDTH, job_of

STEPS = (FitStep(standardize="s"), FitStep(pca="p"))
FITS = (
    Standardize(kind="standardize", name="s", sample=None),
    Pca(kind="pca", name="p", sample=20),
)
# One moment in so many.
STRIDES = pytest.mark.parametrize(
    "stride",
    [pytest.param(5, marks=pytest.mark.chaos), pytest.param(17, marks=pytest.mark.slow), 127],
)


class FitWorld(World):
    """A world whose job has two fits, the second computed from vectors of the first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.embedded: list[str] = []  # each chunk as often as it was embedded

    @contextmanager
    def running(self) -> Iterator["World"]:
        with super().running(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "connected", lambda address: nullcontext())
            patch.setattr(reducing, "_merged", _merged_here)
            yield self

    def _planned(self, _: JobSource, *, refit: bool = False, **__: bool) -> JobPlan:
        me = self.active
        assert me is not None
        job = job_of(self.job_input(me.input))
        encoder = Recipe(model="m", dtype="float32", finish=STEPS)
        config = job.config.model_copy(
            update={
                "encoder": encoder,
                "fit": FITS,
                "output": job.config.output.model_copy(update={"path": self.out}),
                "run": job.config.run.model_copy(update={"max_quarantined": 1.0}),
            }
        )
        job = replace(job, config=config, recipes={"document": encoder}, view_width=WIDTH)
        served = newest_snapshot(job.out)
        found = list_input(config.input, served)
        me.shards = found.shards
        check_apart(config.input.path, job.out, found.shards)
        return plan_settled(job, found, served=served, refit=refit)

    def _chunk(self, plan: JobPlan, chunk: Chunk, fails: bool) -> Outcome:
        folder = f"{plan.job.out}/data/{plan.job.fingerprint[:12]}"
        with self.unnoticed():
            here = {parse_name(file.name).chunk for file in objects.list_files(folder)}
        assert self.active is not None
        # One that slept and lost the output may go on for a while.
        if not self.active.woken.is_set():
            assert chunk.name not in here, f"{chunk.name} is embedded again"
        self.embedded.append(chunk.name)
        return super()._chunk(plan, chunk, fails)

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """What a test looks at is no moment of an operation."""
        me, self.active = self.active, None
        yield
        self.active = me

    def artefacts(self) -> dict[str, bytes]:
        folder = Path(self.out, "artefacts")
        return {path.name: path.read_bytes() for path in folder.glob("*-*.*")}


def _merged_here(step: Any, groups: Any, state_of: Any) -> Any:
    return reduce(step.merge, [state_of(step, group) for group in groups])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FitWorld]:
    """Shards of 23 and of 14 rows, in chunks of five rows and of ten."""
    made = FitWorld(tmp_path)
    with made.running():
        made.write("in/a", 23, 1)
        made.write("in/b", 14, 1)
        yield made


def ended_well(world: FitWorld, **options: bool) -> None:
    ended = world.run(Options(**options))
    assert ended.code == 0, ended.error or ended.result
    world.look()
    world.check_success(ended)


def test_a_run_makes_its_artefacts_and_then_its_vectors(world: FitWorld) -> None:
    ended_well(world)
    records = read_records(world.out)
    assert sorted(record.kind for record in records.values()) == ["pca", "standardize"]
    [claim] = read_claims(world.out)
    steps = claim.recipes["document"]["finish"]
    named = [value for step in steps for value in step.values() if value]
    assert sorted(named) == sorted(record.artefact for record in records.values())
    assert len(world.artefacts()) == 4
    assert verify(world.out).problems == ()
    # And a further run has nothing to do, nor to make.
    before = world.artefacts(), len(world.embedded)
    ended_well(world)
    assert (world.artefacts(), len(world.embedded)) == before


@STRIDES
@pytest.mark.parametrize("how", ["die", "sleep"])
def test_a_run_that_stops_at_any_moment_is_followed_by_one_that_makes_the_same(
    how: str, stride: int, tmp_path: Path
) -> None:
    """Each time in a fresh output; what one that sleeps does afterwards harms nobody."""
    wanted: dict[str, bytes] = {}
    moment, last = 0, 1
    while moment < last + stride:
        world = FitWorld(tmp_path / f"{moment}")
        with world.running():
            # One place for all: it is part of what is hashed.
            world.inputs = tmp_path / "inputs"
            if not (world.inputs / "in").exists():
                world.write("in/a", 23, 1)
                world.write("in/b", 14, 1)
            world.good = _good(world)
            first = world.run(Options(), stop_at=moment or None, how=how)
            last = first.calls if moment == 0 else last
            world.look()
            ended_well(world)
            wanted = wanted or world.artefacts()
            assert world.artefacts() == wanted, f"other artefacts after moment {moment}"
            assert len(read_records(world.out)) == 2
            if how == "sleep" and first.asleep:
                assert world.wake(0).code in (0, 1)
                world.look()
                assert world.artefacts() == wanted
        moment += stride
    assert last > 100


def _good(world: FitWorld) -> dict[tuple[str, str], list[str]]:
    """The ids of good rows, as `World.write` makes them, of shards that are there already."""
    rows = {"a": 23, "b": 14}
    return {
        (file.url, file.etag): [f"1-{row}" for row in range(rows[file.name[0]]) if row != 2]
        for file in objects.find(str(world.inputs / "in"))
    }


def test_an_artefact_stays_while_the_corpus_grows(world: FitWorld) -> None:
    ended_well(world)
    before, made = world.artefacts(), set(world.embedded)
    world.write("in/c", 12, 1)
    ended_well(world)
    assert world.artefacts() == before
    # Nothing but the new shard was embedded, and that once.
    assert {name.split("-")[0] for name in set(world.embedded) - made} == {"in_c"}


def test_refit_makes_another_recipe_beside_the_one_that_is_served(world: FitWorld) -> None:
    ended_well(world)
    served, before = newest_snapshot(world.out), world.artefacts()
    world.write("in/c", 12, 1)
    refused = world.run(Options(refit=True))
    assert (refused.code, "--new-fingerprint" in str(refused.error)) == (2, True)
    assert world.artefacts() == before
    ended_well(world, refit=True, new_fingerprint=True)
    switched = newest_snapshot(world.out)
    assert served is not None
    assert switched is not None
    assert switched.fingerprint != served.fingerprint
    assert before.items() < world.artefacts().items()
    # The standard deviations are others, and so is each vector; the old ones are still there.
    assert [record.number for record in read_records(world.out).values()].count(2) == 1
    for file in served.files:
        assert Path(world.out, file.path).exists()
    # The job goes by the new artefacts from now on.
    ended_well(world)
    assert newest_snapshot(world.out) == switched


def test_a_prune_takes_the_vectors_of_a_fit_and_no_artefact(world: FitWorld) -> None:
    ended_well(world)
    before = world.artefacts()
    assert list(Path(world.out, "fits").glob("*/data/*/*.parquet"))
    assert world.prune().error is None
    world.look()
    assert world.artefacts() == before
    assert list(Path(world.out, "fits").glob("*/data/*/*.parquet")) == []
    assert verify(world.out).problems == ()
    ended_well(world)
    # To refit is then to embed them again.
    ended_well(world, refit=True, new_fingerprint=True)


@STRIDES
def test_a_prune_that_dies_at_any_moment_leaves_a_fit_that_can_be_made_again(
    stride: int, world: FitWorld
) -> None:
    ended_well(world)
    for moment in range(1, 3000, 5 * stride):
        pruned = world.prune(stop_at=moment, how="die")
        world.look()
        ended_well(world, refit=True, new_fingerprint=True)
        if pruned.calls < moment:
            break
        # Or the next prune would have more to read, and so more moments.
        world.prune()
        ended_well(world, refit=True, new_fingerprint=True)
    else:
        pytest.fail("a prune has more moments than this")


def test_a_damaged_artefact_is_refused_before_anything_starts(world: FitWorld) -> None:
    ended_well(world)
    path = next(Path(world.out, "artefacts").glob("standardize-*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    ended = world.run(Options())
    assert (ended.code, f"{path.name}: is missing" in str(ended.error)) == (2, True)
    [problem] = verify(world.out).problems
    assert path.name in problem
    # Without a copy it is made again: the same rows give the same, under the same name.
    assert world.prune().error is None
    ended_well(world, refit=True, new_fingerprint=True)
    assert verify(world.out).problems == ()
    assert path.read_bytes() == content


def test_too_few_rows_are_refused_before_anything_starts(tmp_path: Path) -> None:
    world = FitWorld(tmp_path)
    with world.running():
        world.write("in/a", 4, 1)
        ended = world.run(Options())
        assert ended.code == 2
        assert "fit: p: got 4 of 4 rows, and it needs 5 at least" in str(ended.error)
        assert not Path(world.out).exists()
