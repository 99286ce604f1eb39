"""Artefacts and the records of fits, in a local folder and in a bucket.

Covers: embedjob.output.fits.records
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from embedjob.config.pooling import FitStep
from embedjob.config.recipe import Recipe
from embedjob.errors import OutputError
from embedjob.output.fits.artefacts import (
    ArtefactHead,
    artefact_problems,
    copy_artefacts,
    put_artefact,
    read_artefact,
    read_fitted,
    read_head,
)
from embedjob.output.fits.records import Record, put_record, read_records
from embedjob.storage.objects import list_files
from embedjob.vectors.fits.fitted import Fitted

ENCODER = "e" * 64
WHITENING = Fitted(
    "whiten",
    rows=100,
    width=3,
    tensors={"mean": np.arange(3.0), "matrix": np.arange(6.0).reshape(3, 2)},
    facts={"variance_kept": 0.5},
)


def put(out: str, fitted: Fitted = WHITENING) -> ArtefactHead:
    return put_artefact(out, fitted, encoder=ENCODER, parameters={"dimensions": 2})


def recipe(head: ArtefactHead) -> Recipe:
    return Recipe(model="m", finish=(FitStep(whiten=head.sha256),))


def test_what_was_put_is_read(any_out: str) -> None:
    head = put(any_out)
    assert (head.kind, head.encoder, head.rows, head.width, head.width_after) == (
        ("whiten", ENCODER, 100, 3, 2)
    )
    assert read_head(any_out, "whiten", head.sha256) == head
    fitted = read_fitted(any_out, [recipe(head), recipe(head)])[head.sha256]
    assert (fitted.kind, fitted.rows, fitted.width) == ("whiten", 100, 3)
    for name, tensor in WHITENING.tensors.items():
        assert np.array_equal(fitted.tensors[name], tensor)
        assert fitted.tensors[name].dtype == tensor.dtype
    names = [file.name for file in list_files(any_out)]
    assert names == [f"whiten-{head.sha256[:12]}.json", f"whiten-{head.sha256[:12]}.safetensors"]


def test_equal_content_is_put_once_under_one_name(out: str) -> None:
    assert put(out) == put(out)
    before = list_files(out)
    put(out)
    assert list_files(out) == before
    other = put(out, Fitted("whiten", 101, 3, WHITENING.tensors))
    assert other.sha256 != put(out).sha256


def test_the_sha256_changes_with_each_number_and_each_parameter(out: str) -> None:
    tensors = {**WHITENING.tensors, "mean": WHITENING.tensors["mean"] + 1e-12}
    shas = {
        put(out).sha256,
        put(out, Fitted("whiten", 100, 3, tensors)).sha256,
        put_artefact(out, WHITENING, encoder="f" * 64, parameters={"dimensions": 2}).sha256,
        put_artefact(out, WHITENING, encoder=ENCODER, parameters={"dimensions": 3}).sha256,
    }
    assert len(shas) == 4


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_head(path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "rows": 7}))


@pytest.mark.parametrize(
    ("suffix", "spoil", "words"),
    [
        ("safetensors", Path.unlink, "is missing; restore it from a copy of the output, or del"),
        ("safetensors", _flip, "another sha256"),
        ("safetensors", lambda path: path.write_bytes(b""), "another size"),
        ("json", Path.unlink, "is missing"),
        ("json", _other_head, "is not the file that was put there"),
        ("json", lambda path: path.write_text("{"), "is not the file that was put there"),
    ],
)
def test_damage_is_refused_and_listed(suffix: str, spoil: object, words: str, out: str) -> None:
    head = put(out)
    step = {"whiten": head.sha256}
    assert artefact_problems(out, [step, {"normalize": True}, {"truncate": 3}]) == []
    spoil(Path(out, "artefacts", f"{head.name}.{suffix}"))
    with pytest.raises(OutputError, match=words):
        read_artefact(out, "whiten", head.sha256)
    [problem] = artefact_problems(out, [step])
    assert head.name in problem
    with pytest.raises(OutputError, match=words):
        copy_artefacts(out, f"{out}-2", [recipe(head)])


def test_an_artefact_of_another_kind_is_refused(out: str) -> None:
    head = put(out)
    folder = Path(out, "artefacts")
    for path in [*folder.iterdir()]:
        path.rename(path.with_name(path.name.replace("whiten", "pca")))
    with pytest.raises(OutputError, match="is a whiten, and not a pca"):
        read_head(out, "pca", head.sha256)


def test_tensors_of_another_shape_are_refused(out: str) -> None:
    """Both digests are right: whoever wrote it made no mistake in these."""
    from embedjob.output.fits import artefacts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefacts, "width_after", lambda fitted: 2)
        head = put(out, Fitted("whiten", 100, 3, {"mean": np.zeros(4), "matrix": np.eye(3)}))
    with pytest.raises(OutputError, match="mean has 4 numbers along an axis of 3"):
        read_artefact(out, "whiten", head.sha256)


def test_tensors_that_are_no_safetensors_are_refused(out: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.numpy, "save", lambda tensors: b"not safetensors")
        head = put(out)
    with pytest.raises(OutputError, match="is not a whole safetensors file"):
        read_artefact(out, "whiten", head.sha256)


@pytest.mark.parametrize("name", ["w", "../../etc", "F" * 64, ""])
def test_what_is_no_sha256_names_no_artefact(name: str, out: str) -> None:
    with pytest.raises(OutputError, match="is no sha256 of an artefact"):
        read_head(out, "whiten", name)


def test_an_artefact_is_copied_whole(out: str) -> None:
    head = put(out)
    copy_artefacts(out, f"{out}-2", [recipe(head)])
    assert read_head(f"{out}-2", "whiten", head.sha256) == head


class TestRecords:
    KEY = "0123456789abcdef"

    def record(
        self, head: ArtefactHead, number: int, key: str = KEY, vectors: str | None = None
    ) -> Record:
        return Record(key, number, head.kind, head.sha256, "w", vectors)

    def test_of_several_the_last_counts(self, any_out: str) -> None:
        assert read_records(any_out) == {}
        head = put(any_out)
        other = put(any_out, Fitted("whiten", 101, 3, WHITENING.tensors))
        put_record(any_out, self.record(head, 1, vectors="f" * 16))
        put_record(any_out, self.record(other, 2))
        put_record(any_out, self.record(head, 1, key="a" * 16))
        wanted = {self.KEY: self.record(other, 2), "a" * 16: self.record(head, 1, key="a" * 16)}
        assert read_records(any_out) == wanted

    def test_the_first_of_two_stands(self, any_out: str) -> None:
        head = put(any_out)
        other = put(any_out, Fitted("whiten", 101, 3, WHITENING.tensors))
        put_record(any_out, self.record(head, 1))
        stands = put_record(any_out, self.record(other, 1))
        assert stands.artefact == head.sha256
        assert read_records(any_out)[self.KEY] == stands

    @pytest.mark.parametrize(
        "document", ["[]", "{}", '{"artefact": "../x", "kind": "whiten", "vectors": null}']
    )
    def test_a_record_that_was_edited_is_refused(self, document: str, out: str) -> None:
        put_record(out, self.record(put(out), 1))
        [path] = Path(out, "artefacts", "made").iterdir()
        path.write_text(document)
        with pytest.raises(OutputError, match="is not a record of a fit"):
            read_records(out)
