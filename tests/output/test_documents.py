"""An output's documents after anybody edited them: read, or refused by name, and never more."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedjob.errors import EmbedjobError, OutputError
from embedjob.job.recorded import recorded_recipes
from embedjob.output import lease
from embedjob.output.cleanup import prune
from embedjob.output.documents import NONE, numbered, require_kinds
from embedjob.output.snapshot import open_snapshot, published
from embedjob.reports.verify import verify
from tests.reports.published import output

DOCUMENTS = ("_embedjob.json", "leases/00000002.json", "snapshots/00000001.json")
ODD: tuple[Any, ...] = (
    *(None, True, -1, 10**30, 1.5, float("nan"), "", "x", "../../etc", "2026-01-01", "\ud800"),
    *([], [1], ["x"], [[]], {}, {"a": 1}, {"a": []}),
)
GONE = object()
OPENERS: Mapping[str, Callable[[str], object]] = {
    "open": lambda out: open_snapshot(out).count_rows(),
    "verify": verify,
    "recorded": recorded_recipes,
    "claim": lambda out: lease.acquire(out, job="other", watch_seconds=0.01),
    "prune": lambda out: prune(out, keep=1, grace_seconds=0),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = output(tmp_path_factory.mktemp("whole"))
    lease.release(lease.acquire(str(out), job="job"))
    for opener in ("open", "verify", "claim"):
        OPENERS[opener](str(_copied(out, out.with_name(opener))))
    return out


def _copied(out: Path, to: Path) -> Path:
    """The same files under another name: a local etag holds the inode."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(out, to, copy_function=os.link)


def _rewrite(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(min(2, len(value))):
            yield from _places(value[key], (*path, key))


def _edited(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return document if value is GONE else value
    inside = document
    for key in place[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return document


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_an_edited_document_ends_no_reader_in_a_traceback(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(DOCUMENTS))
    document = json.loads((whole / name).read_text())
    place = data.draw(st.sampled_from([*_places(document)]))
    edited = _edited(document, place, data.draw(st.sampled_from((*ODD, GONE))))
    for opener in OPENERS.values():
        out = _copied(whole, tmp_path / "out")
        _rewrite(out / name, json.dumps(edited))
        outside = tmp_path / "thesis.parquet"
        outside.write_text("mine")
        with suppress(EmbedjobError):
            opener(str(out))
        assert outside.read_text() == "mine"


@pytest.mark.parametrize("recipe", [{}, {"pooling": {"idf": 5}}, {"finish": None, "heads": {}}])
def test_a_recipe_that_lacks_what_a_run_writes(
    whole: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    document = json.loads((whole / DOCUMENTS[0]).read_text())
    document["recipes"]["document"] = recipe
    for opener in OPENERS.values():
        out = _copied(whole, tmp_path / "out")
        _rewrite(out / DOCUMENTS[0], json.dumps(document))
        with suppress(EmbedjobError):
            opener(str(out))


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("text", ["", "{", "[" * 10_000, "\udcff", "9" * 5000])
def test_what_is_no_json_is_named(whole: Path, tmp_path: Path, name: str, text: str) -> None:
    out = _copied(whole, tmp_path / "out")
    (out / name).unlink()
    (out / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    opener = OPENERS["claim"] if name.startswith("leases") else OPENERS["verify"]
    with pytest.raises(OutputError, match=f"{name}: is not JSON"):
        opener(str(out))


def test_a_document_of_another_number_is_refused(whole: Path, tmp_path: Path) -> None:
    out = _copied(whole, tmp_path / "out")
    for name, opener in (("snapshots/00000001", "open"), ("leases/00000002", "claim")):
        (out / name).with_name("00000007.json").write_text((out / f"{name}.json").read_text())
        shutil.copytree(out / "snapshots/00000001", out / "snapshots/00000007", dirs_exist_ok=True)
        with pytest.raises(OutputError, match=r"00000007\.json: has the epoch \d of another"):
            OPENERS[opener](str(out))


def test_only_numbers_as_embedjob_writes_them_count(whole: Path, tmp_path: Path) -> None:
    names = ["00000001.json", "00000002", "3.json", "000000004.json", "²²²²²²²²"]
    assert numbered([*names, "123456789.json"]) == [1, 2, 123456789]
    out = _copied(whole, tmp_path / "out")
    (out / "snapshots" / "9.json").write_text("{}")
    assert published(str(out)) == (1,)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({"a": [1, "x"]}, {"a": [int]}, r'a\[1\] is "x"'),
        ({"a": {"b": None}}, {"a": {"b": str}}, r"a\.b is null"),
        ({"a": 5}, {"a": (NONE, str)}, "a is 5"),
        ([], {"a": int}, r"it is \[\]"),
        ({"a": True}, {"a": int}, "a is true"),
    ],
)
def test_the_place_of_a_wrong_value_is_named(value: Any, kind: Any, said: str) -> None:
    with pytest.raises(OutputError, match=f"here: is not a list of embedjob: {said}"):
        require_kinds(value, kind, url="here", what="a list")
