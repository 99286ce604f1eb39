"""What `verify` says of sampled continuations: missing, damaged, or those of somebody else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedjob.config.heads import TokenIds
from embedjob.config.job_file import recipe_from
from embedjob.job.text_fits import before_heads
from embedjob.output.claim import Claim, Probes
from embedjob.output.fingerprint import fingerprint
from embedjob.output.fits.artefacts import ArtefactHead, put_artefact
from embedjob.output.fits.records import Record, put_record
from embedjob.reports.derived_checks import derived_problems
from embedjob.vectors.fits.continuation_ids import fitted_continuations
from embedjob.vectors.fits.fitted import Fitted

IDS: tuple[TokenIds, ...] = ((5, 9), (7,), (30, 2, 2), (11, 12))
OTHERS: tuple[TokenIds, ...] = ((5, 9), (7,), (30, 2, 3), (11, 12))
DIGESTS = {"model.safetensors": "a1"}
KEY = "0123456789abcdef"


def claim(continuations: object = IDS, *, template: str = "{text}") -> Claim:
    """The claim of a job that scores continuations."""
    recipe = recipe_from(
        {
            "model": "m",
            "dtype": "float32",
            "templates": [template],
            "aggregation": "concat",
            "heads": [{"continuations": continuations}],
        },
        {},
    )
    return Claim(
        chunk_rows=10,
        fingerprint=fingerprint(recipe, DIGESTS),
        recipes={"document": recipe.model_dump(mode="json", exclude_none=True)},
        digests=DIGESTS,
        schema={},
        probes=Probes((), (), ()),
        versions={},
    )


def sampled(
    out: Path, ids: tuple[TokenIds, ...] = IDS, *, template: str = "{text}", number: int = 1
) -> ArtefactHead:
    """What a fit that samples after such views leaves, and its record."""
    recipe = recipe_from(claim(template=template).recipes["document"], {})
    views = fingerprint(before_heads(recipe), DIGESTS)
    fitted = fitted_continuations(ids, texts=2)
    head = put_artefact(str(out), fitted, encoder=views, parameters={"sample": 2, "count": 2})
    put_record(str(out), Record(KEY, number, head.kind, head.sha256, "c", None))
    return head


def test_the_continuations_of_a_claim_are_those_of_an_artefact(out: str) -> None:
    sampled(Path(out))
    assert derived_problems(out, [claim()]) == ((), ())


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "spoil", "said"),
    [
        ("json", Path.unlink, "is missing; restore it from a copy of the output"),
        ("safetensors", Path.unlink, "is missing; restore it from a copy of the output"),
        ("json", _flip, "is not the file that was put there (another sha256)"),
        ("safetensors", _flip, "is not the file that was put there (another sha256)"),
        ("safetensors", lambda path: path.write_bytes(b"x"), "is another file (another size)"),
    ],
)
def test_an_artefact_that_is_missing_or_damaged_is_named_once(
    suffix: str, spoil: Callable[[Path], object], said: str, out: str
) -> None:
    head = sampled(Path(out))
    path = Path(out, "artefacts", f"{head.name}.{suffix}")
    spoil(path)
    [problem] = derived_problems(out, [claim()]).problems
    assert problem.startswith(f"{path}: ")
    assert said in problem


def test_an_artefact_of_another_kind_is_named(out: str) -> None:
    tensors = {"mean": np.arange(3.0), "matrix": np.arange(6.0).reshape(3, 2)}
    whitening = Fitted("whiten", 100, 3, tensors)
    head = put_artefact(out, whitening, encoder="e" * 64, parameters={})
    put_record(out, Record(KEY, 1, "continuations", head.sha256, "c", None))
    for suffix in ("json", "safetensors"):
        name = Path(out, "artefacts", f"{head.name}.{suffix}")
        shutil.copy(name, name.with_name(name.name.replace("whiten", "continuations")))
    [problem] = derived_problems(out, [claim()]).problems
    assert "is a whiten, and not a continuations" in problem


@pytest.mark.parametrize(
    ("ids", "template", "said"),
    [
        (OTHERS, "{text}", "has others of the same views"),
        (IDS, "It says: {text}", "has those of another model or template"),
        (OTHERS, "It says: {text}", "has those of another model or template"),
    ],
)
def test_continuations_of_somebody_else_are_named(
    ids: tuple[TokenIds, ...], template: str, said: str, out: str
) -> None:
    sampled(Path(out), ids, template=template)
    [problem] = derived_problems(out, [claim()]).problems
    assert (
        f"is without the 4 continuations of fingerprint {claim().fingerprint[:12]}, and {said}"
        in problem
    )


def test_what_a_further_fit_has_replaced_serves_its_own_claim(out: str) -> None:
    old, new = sampled(Path(out)), sampled(Path(out), OTHERS, number=2)
    claims = [claim(), claim(OTHERS)]
    assert derived_problems(out, claims) == ((), ())
    for suffix in ("json", "safetensors"):
        Path(out, "artefacts", f"{old.name}.{suffix}").unlink()
    [problem] = derived_problems(out, claims).problems
    assert claims[0].fingerprint[:12] in problem
    # Of the newer one, the artefact itself is what is missing.
    Path(out, "artefacts", f"{new.name}.json").unlink()
    [problem] = derived_problems(out, claims).problems
    assert new.name in problem


def test_continuations_that_a_job_has_written_itself_are_no_problem(out: str) -> None:
    assert derived_problems(out, [claim([" a", " b"])]) == ((), ())
    problems, notes = derived_problems(out, [claim()])
    assert problems == ()
    [note] = notes
    assert f"no artefact has the 4 continuations of fingerprint {claim().fingerprint[:12]}" in note
    # A fit has sampled others beside them, of another number.
    sampled(Path(out), IDS[:3])
    problems, notes = derived_problems(out, [claim(), claim(IDS[:3])])
    assert problems == ()
    assert claim().fingerprint[:12] in notes[0]
    assert len(notes) == 1
