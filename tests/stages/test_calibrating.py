"""A real tokenizer and a real tiny model over real shards; no Ray.

Covers: embedjob.stages.claiming
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedjob.config.job import Input
from embedjob.config.recipe import Recipe
from embedjob.encoder.encoder import Encoder
from embedjob.errors import AccessError, OutputError
from embedjob.input.chunks import Chunk
from embedjob.input.reading import read_chunk
from embedjob.output import lease
from embedjob.output.calibration import sampled_chunks
from embedjob.output.claim import Claim, Probes, read_claims
from embedjob.stages.calibrating import FindRanges, with_quantization
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.engine import RecipeEngine
from embedjob.vectors.quantizing import ranges_of
from tests.encoder import tiny
from tests.planned import files_of
from tests.running import texts
from tests.shards import FINGERPRINT, output_spec, plan_of, write_shard

Read = Callable[[Chunk], pa.Table]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RecipeEngine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDJOB_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = tiny.save("llama", tmp_path_factory.mktemp("model"))
        recipe = Recipe(model=str(model), max_tokens=24, dtype="float32", vector_dtype="int8")
        return RecipeEngine(recipe.model_dump_json())


@pytest.fixture(scope="module")
def encoder(engine: RecipeEngine) -> Encoder:
    return Encoder.from_recipe(engine.recipe, device="cpu")


def reader(job_input: Input) -> Read:
    return lambda chunk: read_chunk(chunk, job_input)


def calibrate(source: Path, *, limit: int | None = None, **job_input: object) -> FindRanges:
    made = Input(path=str(source), text="t", **job_input)
    plan = plan_of(made, limit=limit)
    return FindRanges(sampled_chunks(plan.corpus), reader(made))


def shard(path: Path, bodies: list[str | None], **columns: object) -> None:
    write_shard(path, {"t": pa.array(bodies, pa.string()), **columns}, group_rows=10)


def test_the_ranges_are_those_of_the_good_rows(
    engine: RecipeEngine, encoder: Encoder, tmp_path: Path
) -> None:
    bodies = texts(60)
    shard(tmp_path / "a.parquet", [*bodies[:30], None])
    shard(tmp_path / "b.parquet", [*bodies[30:], bodies[0]])
    (tmp_path / "c.parquet").write_bytes((tmp_path / "b.parquet").read_bytes())
    found = calibrate(tmp_path)
    (tmp_path / "c.parquet").unlink()  # after the plan: its chunks are left out
    made = found(encoder, engine)
    # The text that is there twice is embedded once.
    assert made.vectors == 60
    alone = ranges_of(encoder.encode(bodies))
    assert np.abs(made.array - alone).max() < 1e-5
    # And they are no wider than the rows need, or any ranges would do.
    assert (alone[1] - alone[0]).min() > 0.01


def test_a_trial_takes_the_ranges_of_the_whole_corpus(
    engine: RecipeEngine, encoder: Encoder, tmp_path: Path
) -> None:
    shard(tmp_path / "a.parquet", [*texts(40)])
    whole, trial = calibrate(tmp_path), calibrate(tmp_path, limit=5)
    assert trial.chunks == whole.chunks
    assert trial(encoder, engine) == whole(encoder, engine)


def test_rows_behind_a_filter_are_looked_for_to_the_end_of_the_sampled_chunks(
    engine: RecipeEngine, encoder: Encoder, tmp_path: Path
) -> None:
    """Of 40,000 rows in a chunk the first 16,384 are read, and none of them passes."""
    bodies = ["not wanted"] * 39_990 + texts(10)
    wanted = [False] * 39_990 + [True] * 10
    write_shard(tmp_path / "a.parquet", {"t": bodies, "wanted": wanted}, group_rows=40_000)
    job_input = Input(path=str(tmp_path), text="t", filter=(("wanted", "==", True),))
    plan = plan_of(job_input, chunk_rows=40_000)
    assert len(plan.chunks) == 1
    made = FindRanges(sampled_chunks(plan.corpus), reader(job_input))(encoder, engine)
    assert made.vectors == 10


@pytest.mark.parametrize("bodies", [["one alone", None], [None, None], ["twice", "twice"]])
def test_ranges_need_two_vectors(
    engine: RecipeEngine, encoder: Encoder, tmp_path: Path, bodies: list[str | None]
) -> None:
    shard(tmp_path / "a.parquet", bodies)
    with pytest.raises(OutputError, match="at least 2 are needed; set vector_dtype: float32"):
        calibrate(tmp_path)(encoder, engine)


class TestClaiming:
    def claiming(self, out: Path, found: FindRanges, engine: RecipeEngine) -> ClaimAndCheck:
        claim = Claim(
            chunk_rows=10,
            fingerprint=FINGERPRINT,
            recipes={"document": engine.recipe.model_dump(mode="json")},
            digests={},
            schema={},
            probes=Probes((), (), ()),
            versions={},
        )
        mine = lease.acquire(str(out), job="test", takeover=True)
        return ClaimAndCheck(mine, claim, "float32", files_of(engine.recipe), calibrate=found)

    def test_the_first_claim_keeps_the_ranges_and_nobody_samples_again(
        self, engine: RecipeEngine, encoder: Encoder, tmp_path: Path
    ) -> None:
        shard(tmp_path / "in" / "a.parquet", [*texts(30)])
        found, out = calibrate(tmp_path / "in"), tmp_path / "out"
        self.claiming(out, found, engine)(encoder, engine)
        (claim,) = read_claims(str(out))
        assert np.array_equal(claim.calibration.array, found(encoder, engine).array)
        unread = replace(found, rows_of=lambda chunk: pytest.fail(f"{chunk} was read again"))
        self.claiming(out, unread, engine)(encoder, engine)
        assert read_claims(str(out)) == (claim,)

    def test_a_node_with_another_disk_there_claims_nothing(
        self,
        engine: RecipeEngine,
        encoder: Encoder,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(lease, "_SEEN_PAUSES", ())
        shard(tmp_path / "in" / "a.parquet", [*texts(30)])
        out = tmp_path / "out"
        claiming = self.claiming(out, calibrate(tmp_path / "in"), engine)
        out.rename(tmp_path / "elsewhere")
        with pytest.raises(AccessError, match="this node does not see the file"):
            claiming(encoder, engine)
        assert not out.exists()

    def test_who_comes_second_writes_by_the_ranges_that_stand(
        self, engine: RecipeEngine, encoder: Encoder, tmp_path: Path
    ) -> None:
        """Another run claims while this one is at its sample."""
        shard(tmp_path / "a" / "a.parquet", [*texts(30)])
        shard(tmp_path / "b" / "b.parquet", [*texts(30, seed=1)])
        out = tmp_path / "out"
        first, second = calibrate(tmp_path / "a"), calibrate(tmp_path / "b")
        winner = first(encoder, engine)

        def overtaken(chunk: Chunk) -> pa.Table:
            if not read_claims(str(out)):
                self.claiming(out, first, engine)(encoder, engine)
            return second.rows_of(chunk)

        self.claiming(out, replace(second, rows_of=overtaken), engine)(encoder, engine)
        assert np.array_equal(read_claims(str(out))[0].calibration.array, winner.array)
        job_input = Input(path=str(tmp_path / "b"), text="t")
        ours = output_spec(job_input, plan_of(job_input).types, vector_dtype="int8")
        stands = with_quantization(ours, str(out), vector_dtype="int8")
        assert np.array_equal(stands.calibration.array, winner.array)
        assert stands.quantize(np.zeros((1, winner.array.shape[1]), np.float32)).dtype == np.int8


def test_an_output_that_lost_its_ranges_is_not_written_to(tmp_path: Path) -> None:
    shard(tmp_path / "in" / "a.parquet", ["a"])
    job_input = Input(path=str(tmp_path / "in"), text="t")
    ours = output_spec(job_input, plan_of(job_input).types, vector_dtype="uint8")
    with pytest.raises(OutputError, match="no claim of fingerprint ffffffffffff has the ranges"):
        with_quantization(ours, str(tmp_path / "out"), vector_dtype="uint8")
    assert (
        with_quantization(ours, str(tmp_path / "out"), vector_dtype="ubinary").calibration is None
    )
    assert with_quantization(ours, str(tmp_path / "out"), vector_dtype="float32") is ours
