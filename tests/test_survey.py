"""What a survey knows of a job before any weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.errors import ModelError
from embedjob.jobfile import Draft, Layer
from embedjob.survey import survey
from tests.encoder import tiny


def draft(tmp_path: Path, dense: dict[str, Any], **encoder: Any) -> Draft:
    folder = tiny.save("bert", tmp_path / "bert")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"read by nobody yet")
    pq.write_table(pa.table({"body": ["a fox", "a dog"]}), tmp_path / "in.parquet")
    document = {
        "input": {"path": str(tmp_path / "in.parquet"), "text": "body"},
        "encoder": {"model": str(folder), "heads": [{"dense": "2_Dense"}], **encoder},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": str(tmp_path / "out")},
    }
    return Draft((Layer("job.yaml", document),))


@pytest.mark.parametrize(
    ("encoder", "wide_in", "width"),
    [
        ({}, 32, 12),
        ({"pooling": ["first", "mean", "max"]}, 96, 12),
        ({"templates": ["{text}", "x {text}"], "aggregation": "concat"}, 32, 24),
        ({"finish": [{"truncate": 5}]}, 32, 5),
    ],
)
def test_heads_and_poolings_change_the_width_before_a_model_is_loaded(
    encoder: dict[str, Any], wide_in: int, width: int, tmp_path: Path
) -> None:
    dense = {"in_features": wide_in, "out_features": 12}
    found = survey(draft(tmp_path, dense, **encoder))
    assert found.width == width
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= found.digests.keys()


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    dense = {"in_features": 64, "out_features": 12}
    with pytest.raises(ModelError, match="takes vectors 64 wide, but they are 32 wide there"):
        survey(draft(tmp_path, dense))
