"""A corpus that changes from night to night, and what each night must leave."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from embedjob.encoder.encoder import Encoder
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from embedjob.storage.objects import list_files
from embedjob.text.conversations import text_hash
from tests import running
from tests.cluster import Cluster
from tests.drivers import driver
from tests.outputs import written
from tests.running import Job, job_file, write_shard

EDITED, GONE, NEW = 7, 5, 6


@dataclass
class Nights:
    """A corpus that is written anew every night, and its output, local or in a bucket."""

    folder: Path
    out: str
    model: Path
    cluster: Cluster
    chance: random.Random
    bodies: list[str] = field(default_factory=list)
    night: int = 0

    @property
    def document(self) -> Job:
        return running.job(
            self.folder / "in",
            self.out,
            self.model,
            input={"keep": ["night"]},
            encoder={"max_tokens": 72},
            run={"max_shrink": 1.0},
        )

    def write(self) -> None:
        """Files of other names and sizes than before; two rows of one text stand side by side."""
        source = self.folder / "in"
        for old in source.glob("*.parquet"):
            old.unlink()
        per_shard = self.chance.randrange(25, 60)
        for start in range(0, len(self.bodies), per_shard):
            bodies = self.bodies[start : start + per_shard]
            path = source / f"night-{self.night}-{start:03}.parquet"
            write_shard(path, bodies, night=[self.night] * len(bodies))

    def change(self) -> None:
        """The next night's corpus: some texts edited, some gone, some new, in another order."""
        self.night += 1
        for place in self.chance.sample(range(len(self.bodies)), EDITED):
            self.bodies[place] = f"{self.bodies[place]} edited on night {self.night}"
        for _ in range(GONE):
            self.bodies.pop(self.chance.randrange(len(self.bodies)))
        self.bodies += [f"a new text {number} of night {self.night}" for number in range(NEW)]
        if self.chance.random() < 0.5:
            self.chance.shuffle(self.bodies)
        self.bodies.insert(20, self.bodies[20])
        self.write()

    def vectors(self) -> dict[bytes, bytes]:
        """What readers have for each text."""
        table = open_snapshot(self.out).to_table(columns=["text_hash", "embedding"])
        rows = np.stack(table["embedding"].to_pylist()).astype(np.float32)
        hashes = table["text_hash"].to_pylist()
        return {one: row.tobytes() for one, row in zip(hashes, rows, strict=True)}

    def run(self) -> None:
        ran = running.run(
            self.document, self.folder, "--takeover", "--address", self.cluster.address
        )
        assert ran.code == 0, ran.err

    def night_of_kills(self, night: int) -> None:
        """A changed corpus, whose runs are killed up to three times before one is left alone."""
        self.change()
        for kill in range(self.chance.randrange(1, 4)):
            self.killed(f"night-{night}-{kill}")
        self.run()

    def killed(self, name: str) -> None:
        """A run whose driver gets SIGKILL between its lease and its end."""
        job = job_file(self.document, self.folder)
        options = ("--json", "--takeover", "--address", self.cluster.address)
        before, files = self._leases(), len(written(self.out))
        with driver(self.folder, "run", str(job), *options, name=name) as victim:
            victim.until_over_or(lambda: self._leases() != before, "lease", pause=0.005)
            # By time, keys are being compared or vectors gathered; by files, chunks are written.
            if self.chance.random() < 0.6:
                time.sleep(self.chance.uniform(0.0, 6.0))
            else:
                more = files + self.chance.randrange(1, 10)
                victim.until_over_or(lambda: len(written(self.out)) >= more, "files")
            victim.kill()

    def _leases(self) -> list[str]:
        return [file.name for file in list_files(f"{self.out}/leases")]

    def require_whole(self, before: dict[bytes, bytes], full: Encoder) -> None:
        """Readers have each row with its columns; old texts have old vectors, and none was made."""
        assert running.command("verify", self.out, "--json").summary["problems"] == []
        table = open_snapshot(self.out).to_table()
        table = table.sort_by([("shard", "ascending"), ("row", "ascending")])
        hashes = [text_hash(body) for body in self.bodies]
        assert table["text_hash"].to_pylist() == hashes
        assert table["night"].to_pylist() == [self.night] * len(hashes)
        assert table["id"].to_pylist() == self._ids()
        vectors = np.stack(table["embedding"].to_pylist())
        assert np.einsum("rd,rd->r", vectors, full.encode(self.bodies)).min() >= 0.99999
        old = {one: row for one, row in self.vectors().items() if one in before}
        assert old == {one: before[one] for one in old}
        snapshot = newest_snapshot(self.out)
        assert snapshot is not None
        known = sum(one in before for one in hashes)
        assert known > len(hashes) // 2
        assert snapshot.files.counts["reused"] == known

    def _ids(self) -> list[str]:
        files = sorted((self.folder / "in").glob("*.parquet"))
        return [one for file in files for one in pq.read_table(file)["doc_id"].to_pylist()]
