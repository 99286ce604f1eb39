"""A reader that looks all the time, while runs, repairs and prunes are killed or sleep."""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from embedjob.output.manifest import SnapshotFile
from embedjob.output.snapshot import newest_snapshot, open_snapshot, publish
from embedjob.storage import objects
from tests import running
from tests.cluster import Cluster, wait
from tests.drivers import SEEDS, SLOW_SEEDS, Driver, chance_of, driver
from tests.output.epochs import commit_left, small_corpus
from tests.outputs import written
from tests.running import Job, job_file, texts, write_shard

SHARDS, SHARD_ROWS = 3, 30
# Longer than a look, and short enough for prunes to delete what an earlier round has replaced.
GRACE_SECONDS = 5.0
LOOK_PAUSE = 0.05

Kind = Literal["run", "retry", "repair", "prune"]
Blow = Literal["kill", "suspend"]
KINDS: tuple[Kind, ...] = ("prune", "retry", "run", "repair")
OPTIONS = {"run": (), "retry": ("--retry-quarantined",), "repair": ("--repair",)}


class Reader(threading.Thread):
    """Reads the newest snapshot again and again, and every file that it lists."""

    def __init__(self, out: str) -> None:
        super().__init__(daemon=True)
        self.out = out
        self.looks = 0
        self.epochs: list[int] = []
        self.broken: str | None = None
        self._over = threading.Event()
        self._contents: dict[str, str] = {}

    def run(self) -> None:
        over = False
        while self.broken is None:
            began = time.monotonic()
            try:
                broken = self._look()
            except Exception as error:
                broken = repr(error)
            # A file may go once its snapshot has been replaced for the grace time: such a look
            # began with a snapshot that need not be there any more.
            if broken is not None and time.monotonic() - began < GRACE_SECONDS:
                self.broken = broken
            self.looks += 1
            if over:
                return
            # The last look begins after the last command.
            over = self._over.wait(LOOK_PAUSE)

    def _look(self) -> str | None:
        """What is not as the newest snapshot says."""
        snapshot = newest_snapshot(self.out)
        if snapshot is None:
            return "the snapshots are gone" if self.epochs else None
        if snapshot.epoch not in self.epochs[-1:]:
            if self.epochs and snapshot.epoch < self.epochs[-1]:
                return f"snapshot {self.epochs[-1]} is gone, and {snapshot.epoch} is the newest"
            self.epochs.append(snapshot.epoch)
        for file in snapshot.files:
            if problem := self._file(file):
                return f"snapshot {snapshot.epoch}: {file.path}: {problem}"
        return None

    def _file(self, file: SnapshotFile) -> str | None:
        url = objects.join(self.out, file.path)
        stored = objects.stat(url)
        if stored is None:
            return "is missing"
        if (stored.etag, stored.size) != (file.etag, file.bytes):
            return f"is {stored}, listed is {file}"
        if "://" not in self.out:
            content = hashlib.sha256(objects.read_bytes(url)).hexdigest()
            if self._contents.setdefault(file.path, content) != content:
                return "has another content than before"
        return None

    def __enter__(self) -> "Reader":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@dataclass
class World:
    """A corpus that changes, its output, and what may happen to both."""

    folder: Path
    out: str
    model: Path
    cluster: Cluster
    chance: random.Random
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def document(self) -> Job:
        return running.job(
            self.folder / "in",
            self.out,
            self.model,
            input={"keep": ["version"]},
            encoder={"max_tokens": 72},
            # Suspended drivers keep their actors.
            pool={"cpus_per_actor": 0.1},
            run={"max_quarantined": 1.0, "max_shrink": 1.0},
        )

    def change(self) -> None:
        """Add a shard, replace one, or take one away."""
        what = self.chance.choice(("add", "replace", "replace", "remove"))
        shards = sorted(self.versions)
        if what == "add" or len(shards) < 2:
            self.put(max(shards, default=-1) + 1, 0)
        elif what == "replace":
            shard = self.chance.choice(shards)
            self.put(shard, self.versions[shard] + 1)
        else:
            shard = self.chance.choice(shards)
            del self.versions[shard]
            (self.folder / "in" / f"{shard}.parquet").unlink()

    def put(self, shard: int, version: int) -> None:
        """One row of a shard is bad: chunks with bad rows are those that a retry makes again."""
        self.versions[shard] = version
        bodies: list[str | None] = [
            f"{text} {text} {text}" for text in texts(SHARD_ROWS, seed=100 * shard + version)
        ]
        bodies[4] = None
        path = self.folder / "in" / f"{shard}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_shard(self.folder / path.name, bodies, version=[version] * SHARD_ROWS).replace(path)

    def expected(self) -> list[tuple[str, int]]:
        """The ids of the corpus, each with its shard's version."""
        return sorted(
            (f"{shard}-{row}", version)
            for shard, version in self.versions.items()
            for row in range(SHARD_ROWS)
            if row != 4
        )

    def require_served(self) -> None:
        """What readers see is exactly the corpus."""
        table = open_snapshot(self.out).to_table(columns=["id", "version"])
        seen = zip(table["id"].to_pylist(), table["version"].to_pylist(), strict=True)
        assert sorted(seen) == self.expected()

    def command(self, kind: Kind) -> tuple[str, ...]:
        if kind == "prune":
            return ("prune", self.out, "--keep", "1", "--grace", f"{GRACE_SECONDS}s")
        if kind == "repair":
            self._lose_bad_rows()
        job = str(job_file(self.document, self.folder))
        address = ("--address", self.cluster.address)
        return ("run", job, "--json", "--takeover", *address, *OPTIONS[kind])

    def _lose_bad_rows(self) -> None:
        """Somebody deletes the bad rows of a chunk: a repair makes the chunk again."""
        found = objects.list_files(f"{self.out}/quarantine")
        if found:
            objects.delete(self.chance.choice(found).url)

    @contextmanager
    def struck(self, kind: Kind, blow: Blow, name: str) -> Iterator[Driver]:
        """A command that is killed, or suspended, at some moment between its lease and its end."""
        before = self._leases()
        with driver(self.folder, *self.command(kind), name=name) as victim:
            victim.until_over_or(lambda: self._leases() != before, "lease", pause=0.005)
            self._moment(kind, victim)
            if blow == "suspend":
                victim.suspend()
            else:
                victim.kill()
            yield victim

    def _leases(self) -> list[str]:
        return [file.name for file in objects.list_files(f"{self.out}/leases")]

    def _moment(self, kind: Kind, victim: Driver) -> None:
        """Wait for some chunks or for some time: publishing is soon over, and so is a prune."""
        if kind == "prune":
            time.sleep(self.chance.uniform(0.0, 0.1))
            return
        if self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0.0, 5.0))
            return
        first, more = len(written(self.out)), self.chance.randrange(1, 4)
        victim.until_over_or(lambda: len(written(self.out)) >= first + more, "files")
        time.sleep(self.chance.uniform(0.0, 0.5))

    def succeeds(self, kind: Kind) -> None:
        """A command to its end, in this process: what it says is true."""
        ran = running.command(*self.command(kind))
        assert ran.code == 0, ran.err
        self.require_served()


def _round(world: World, kind: Kind, blow: Blow, name: str) -> None:
    """A victim, the command after it, and the moment at which a suspended victim wakes."""
    chance = world.chance
    if chance.random() < 0.7:
        world.change()
    with world.struck(kind, blow, name) as victim, ExitStack() as stack:
        if chance.random() < 0.5:
            world.change()
        if blow == "suspend":
            waker = threading.Timer(chance.uniform(0.0, 8.0), victim.wake)
            waker.start()
            stack.callback(waker.join)
        world.succeeds(chance.choice(("run", "run", "retry", "repair")))
        stack.close()
        if blow == "suspend":
            _ends(victim)
    world.require_served()


def _ends(victim: Driver) -> None:
    """Whoever wakes up too late says so, and is no crash."""
    code = victim.process.wait(60)
    assert code in (0, 1), victim.said()
    assert "Traceback" not in victim.said(), victim.said()


SPOILS: dict[str, Callable[[Path], object]] = {
    "is missing": Path.unlink,
    # The same bytes under the same name are another file.
    "listed is": lambda file: file.write_bytes(file.read_bytes()),
}


@pytest.mark.parametrize("said", SPOILS)
def test_the_reader_notices_a_file_that_is_not_as_listed(
    said: str, out: str, tmp_path: Path
) -> None:
    _, snapshot = commit_left(small_corpus(tmp_path), out, epoch=1)
    publish(out, snapshot)
    with Reader(out) as reader:
        wait(lambda: reader.looks > 1, "looks")
        assert reader.broken is None
        SPOILS[said](Path(out, snapshot.files[1].path))
    assert reader.broken is not None
    assert said in reader.broken
    assert snapshot.files[1].name in reader.broken


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_reader_never_misses_a_file(
    seed: int,
    place: Callable[[int], str],
    slow_model: Path,
    cluster: Cluster,
    tmp_path: Path,
    say: Callable[[str], None],
) -> None:
    chance = chance_of(seed, "reader")
    world = World(tmp_path, place(seed), slow_model, cluster, chance)
    for shard in range(SHARDS):
        world.put(shard, 0)
    with Reader(world.out) as reader:
        _round(world, "run", chance.choice(("kill", "suspend")), "first")
        for number in range(1 if seed < SLOW_SEEDS else 4):
            kind = KINDS[(seed + number) % len(KINDS)]
            _round(world, kind, chance.choice(("kill", "suspend")), f"round-{number}")
            assert reader.broken is None
        # Bad rows that were lost without a repair are made again, too.
        world.succeeds("repair")
    assert reader.broken is None
    say(f"seed {seed}: {reader.looks} looks at the snapshots {reader.epochs}")
    assert reader.epochs
    assert running.command("prune", world.out, "--keep", "1", "--grace", "0s").code == 0
    assert running.command("verify", world.out, "--json").summary["problems"] == []
