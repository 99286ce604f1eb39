"""Make the kept bucket anew: a model, two shards, and the output of a run over them.

What lies beside this file was made with the code of commit f0a8b4a, the last before modules were
moved to rooms. To make it anew, run in a checkout of that commit, with this file copied to it:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/outputs_kept/make.py KEPT

KEPT is the folder `tests/outputs_kept` of the newer tree, with its `bucket` removed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import s3fs
import torch
from transformers import BertConfig, BertModel

from embedjob.encoder.encoder import Encoder
from tests import running
from tests.cluster import AUTH, ROOT, ray_cluster
from tests.encoder import tiny
from tests.seaweed import seaweed

# Absolute paths are part of file names and fingerprints: the test uses a bucket of this name.
BUCKET = "embedjob-kept"
QUERIES = ["a fox near the river", "which list of numbers?"]


def make(kept: Path) -> None:
    """Run the job in a bucket, and write all that is in the bucket then to `kept`."""
    with seaweed() as server, tempfile.TemporaryDirectory() as folder:
        os.environ |= {**AUTH, **server.environment, "EMBEDJOB_CACHE": f"{folder}/cache"}
        bucket = server.make_bucket(BUCKET)
        storage = s3fs.S3FileSystem(endpoint_url=server.endpoint)
        for path in _inputs(Path(folder, "inputs")):
            name = path.relative_to(f"{folder}/inputs")
            storage.pipe_file(f"{BUCKET}/{name}", path.read_bytes())
        document = _job(bucket)
        with ray_cluster({**os.environ, "PYTHONPATH": str(ROOT)}) as cluster:
            ran = running.run(document, Path(folder), "--address", cluster.address)
        assert ran.code == 0, ran.err
        vectors = Encoder.from_output(f"{bucket}/out").encode(QUERIES, role="query")
        storage.invalidate_cache()
        for name in storage.find(BUCKET):
            path = kept / "bucket" / name.removeprefix(f"{BUCKET}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.cat_file(name))
        for path in (kept / "bucket" / "out" / "leases").iterdir():
            lease = json.loads(path.read_text())
            # Which machine it was is nobody's business, and no reader asks.
            path.write_text(json.dumps(lease | {"host": "host"}))
    answers = dict(zip(QUERIES, vectors.tolist(), strict=True))
    for name, content in {"job": document, "queries": answers}.items():
        (kept / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _inputs(folder: Path) -> list[Path]:
    """A model of 60 KB, and two shards: one in three chunks, with a null, and one in one."""
    torch.manual_seed(0)
    size = {**tiny.SIZE, "hidden_size": 16, "intermediate_size": 32}
    BertModel(BertConfig(**size)).save_pretrained(folder / "model")
    tiny.tokenizer("bert").save(str(folder / "model" / "tokenizer.json"))
    running.write_shard(folder / "in" / "a.parquet", [*running.texts(25), None])
    running.write_shard(folder / "in" / "b.parquet", running.texts(8, seed=1))
    return [path for path in folder.rglob("*") if path.is_file()]


def _job(bucket: str) -> dict[str, Any]:
    document = running.job(
        f"{bucket}/in",
        f"{bucket}/out",
        f"{bucket}/model",
        encoder={"method": "e5"},
        run={"max_quarantined": 0.1},
    )
    # The method has its own, one for each role.
    del document["encoder"]["templates"]
    return document


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
