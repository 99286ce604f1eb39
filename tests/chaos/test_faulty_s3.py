"""Whole runs from bucket to bucket, through an S3 that fails one request of twenty."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from embedjob.storage import objects
from tests import running
from tests.chaos.compared import Done, done
from tests.cluster import ROOT, Cluster, ray_cluster
from tests.drivers import SEEDS, chance_of
from tests.faulty_s3 import FaultyS3, faulty_s3
from tests.running import Job, texts, write_shard
from tests.seaweed import S3Server

pytestmark = pytest.mark.ray
SHARDS, SHARD_ROWS = 3, 40
SHARE = 0.05
# Tonight one text of so many is edited, and so many are new.
EDITED, NEW = 20, 4
# A request without answer keeps its client for twenty seconds.
WITH_SILENCE = (0, 5, 10, 15)


@dataclass(frozen=True)
class Bucket:
    """A corpus and a model in a bucket, behind a proxy that drivers and workers alike have."""

    url: str
    faulty: FaultyS3
    cluster: Cluster

    def run(self, out: str, log: Path, *, docs: str = "docs", old: str | None = None) -> Done:
        """A run to an output in the bucket; the proxy is quiet afterwards.

        It takes over vectors of the output `old`.
        """
        document: Job = running.job(f"{self.url}/{docs}", f"{self.url}/{out}", f"{self.url}/model")
        if old is not None:
            document["output"]["reuse_from"] = [f"{self.url}/{old}"]
        return done(document, self.cluster, log, calm=partial(self.faulty.fail, "", times=0))


@pytest.fixture(scope="module")
def bucket_behind(
    s3: S3Server,
    ray_settings: dict[str, str],
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("docs")
    with faulty_s3(s3) as (faulty, endpoint), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        url = s3.make_bucket("behind-a-faulty-proxy")
        every = [text for shard in range(SHARDS) for text in texts(SHARD_ROWS, seed=shard)]
        nights = {"docs": (every, SHARD_ROWS), "tonight": (tonight(every), 35)}
        for docs, (bodies, rows) in nights.items():
            for start in range(0, len(bodies), rows):
                file = write_shard(folder / f"{start:03}.parquet", bodies[start : start + rows])
                objects.create(f"{url}/{docs}/{file.name}", file.read_bytes())
        for file in model.iterdir():
            objects.create(f"{url}/model/{file.name}", file.read_bytes())
        environment = {**os.environ, **ray_settings, "PYTHONPATH": str(ROOT)}
        with ray_cluster(environment) as cluster:
            yield Bucket(url, faulty, cluster)


def tonight(bodies: list[str]) -> list[str]:
    """The corpus with some texts edited and some new, backwards."""
    edited = [f"{text} edited" if n % EDITED == 0 else text for n, text in enumerate(bodies)]
    return [*edited, *(f"a new text of number {number}" for number in range(NEW))][::-1]


@pytest.fixture(scope="module")
def quiet(bucket_behind: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return bucket_behind.run("quiet", tmp_path_factory.mktemp("quiet") / "encoded")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_faulty_s3_changes_nothing_of_a_run(
    seed: int, bucket_behind: Bucket, quiet: Done, tmp_path: Path, say: Callable[[str], None]
) -> None:
    faulty = bucket_behind.faulty
    faulty.asked.clear()
    silent = int(seed in WITH_SILENCE)
    faulty.fail_by_chance(chance_of(seed, "faulty"), SHARE, silent=silent)
    ended = bucket_behind.run(f"seed-{seed}", tmp_path / "encoded")
    failed = [fault for *_, fault in faulty.asked if fault]
    say(f"seed {seed}: {len(failed)} requests failed; {ended.beside(quiet)}")
    assert len(failed) >= 3
    ended.require_equal(quiet)
    # Storage is asked again where it failed, so nothing that was encoded is lost.
    assert ended.encoded == quiet.encoded


@pytest.fixture(scope="module")
def embedded_anew(
    bucket_behind: Bucket, quiet: Done, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """Tonight's corpus, from nothing."""
    log = tmp_path_factory.mktemp("anew") / "encoded"
    return bucket_behind.run("anew", log, docs="tonight")


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_faulty_s3_changes_nothing_of_a_night(
    seed: int,
    bucket_behind: Bucket,
    embedded_anew: Done,
    tmp_path: Path,
    say: Callable[[str], None],
) -> None:
    """What changed is embedded, and the rest comes out of files that storage fails to give."""
    faulty = bucket_behind.faulty
    faulty.asked.clear()
    silent = int(seed in WITH_SILENCE)
    faulty.fail_by_chance(chance_of(seed, "faulty night"), SHARE, silent=silent)
    log = tmp_path / "encoded"
    ended = bucket_behind.run(f"night-{seed}", log, docs="tonight", old="quiet")
    failed = [fault for *_, fault in faulty.asked if fault]
    say(f"seed {seed}: {len(failed)} requests failed; {ended.encoded} texts encoded")
    assert len(failed) >= 3
    ended.require_equal(embedded_anew)
    assert ended.encoded == SHARDS * SHARD_ROWS // EDITED + NEW
