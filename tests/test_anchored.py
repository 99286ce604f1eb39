"""A job whose vectors are numbers of anchors: real Ray, real Parquet, read back by its queries."""

from pathlib import Path

import numpy as np
import pytest

from embedjob.encoder.encoder import Encoder
from embedjob.reports.verify import verify
from tests import running
from tests.cluster import Cluster
from tests.outputs import published
from tests.running import texts, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_corpus_is_embedded_by_its_anchors(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    bodies = list(texts(12))
    write_shard(tmp_path / "in" / "a.parquet", bodies, group_rows=10)
    encoder = {
        "heads": [{"anchors": [" the fox.", " a dog", " 7"]}],
        "aggregation": "concat",
        "finish": [],
        "similarity": "manhattan",
        "max_tokens": 48,
    }
    document = running.job(tmp_path / "in", tmp_path / "out", model, encoder=encoder)
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert ran.summary["embedded"] == 12
    out = str(tmp_path / "out")
    assert verify(out).problems == ()
    found = np.stack(published(out)["embedding"].to_pylist())
    assert found.shape == (12, 3)
    assert (found < 0).all()
    np.testing.assert_allclose(found, Encoder.from_output(out).encode(bodies), rtol=1e-4)
