"""Job files: merged, checked, and refused by the key that is wrong.

Covers: embedjob.config.recipe
"""

import datetime
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedjob.config.job import Input, Job
from embedjob.config.job_file import Layer, merge, read_job, validate, validate_partial
from embedjob.errors import ConfigError

JOB: dict[str, Any] = {
    "input": {"path": "in", "text": "body"},
    "encoder": {"model": "m"},
    "output": {"path": "out"},
}


def write(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def refused(path: Path, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_partial(read_job(path, sets))
    return str(caught.value)


def test_a_sound_job_is_not_refused(tmp_path: Path) -> None:
    validate_partial(read_job(write(tmp_path, JOB)))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.poolling=mean", "unknown key poolling; allowed are"),
        ("encoder.poolling=mean", "did you mean pooling?"),
        ("encoder.pooling=meen", "encoder.pooling: got \"meen\", allowed is 'mean'"),
        ("encoder.max_tokens='512'", 'encoder.max_tokens: got "512", allowed is a valid integer'),
        ("encoder.max_tokens=0", "greater than or equal to 1"),
        ("output.chunk_rows=1.5", "output.chunk_rows: got 1.5"),
        ("run.wait_for_resources=30x", "such as 90s, 30m or 2h"),
        ("run.until=25:00", "run.until: got 25:00, allowed is a time of day (06:00), a moment"),
        ("run.until=2026-11-30T06:00", "a moment with its zone (2026-11-30T06:00+01:00)"),
        ("run.until=6", "run.until: got 6, allowed is a valid string"),
        ("run.max_quarantined=2", "run.max_quarantined: got 2"),
        ("input.keep=[row]", "input.keep: row would collide"),
        ("encoder.heads=[dense]", 'encoder.heads.0: got "dense", allowed is an object'),
        ("encoder.heads=[{dense: ../x}]", "encoder.heads.0.dense: got '../x', allowed is a dir"),
        ("encoder.heads=[{denser: x}]", "an object with one of the keys pooler, dense"),
        ("encoder.pooling=[mean, latent_attention]", "encoder.pooling"),
        ("encoder.vector_dtype=int4", "encoder.vector_dtype: got \"int4\", allowed is 'float32'"),
        ("encoder.long_text=whole", "got \"whole\", allowed is 'truncate'"),
        ("output.reuse_from=s3://other/", "output.reuse_from: got"),
        (
            "encoder.templates=[[{text: {}, literal: x}]]",
            "a segment has exactly one of literal",
        ),
        ("generate.seed=x", 'generate.seed: got "x"'),
        ("generate.pool.actors=0", "generate.pool.actors: got 0"),
        ("generate.modle=x", "unknown key modle; allowed are model, revision, kinds"),
        ("encoder.generate={count: 2}", "generate is a section of its own"),
        ("input.path=12", "input.path: got 12"),
    ],
)
def test_each_mistake_is_named_with_its_key(tmp_path: Path, override: str, said: str) -> None:
    assert said in refused(write(tmp_path, JOB), override)


def test_an_error_names_who_set_the_key(tmp_path: Path) -> None:
    path = write(tmp_path, JOB)
    assert "(set by --set encoder.pooling)" in refused(path, "encoder.pooling=meen")
    document = {**JOB, "encoder": {"model": "m", "pooling": "meen"}}
    assert f"(set by {path})" in refused(write(tmp_path, document))


@pytest.mark.parametrize(
    "text", ["- a", "a: [", "", "just text", "input: {a: !!python/object:os.x 1}"]
)
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        read_job(path)


def test_a_missing_file_and_an_unknown_section_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_job(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"unknown key pol; allowed are .*did you mean pool"):
        read_job(write(tmp_path, {**JOB, "pol": {}}))


@pytest.mark.parametrize("text", ["pooling=mean", "encoder.pooling", "nothing.x=1", "encoder.x=[a"])
def test_an_override_must_be_a_path_and_a_value(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        read_job(write(tmp_path, JOB), [text])


def test_the_last_override_wins_and_nested_ones_merge(tmp_path: Path) -> None:
    sets = ["pool.actors.max=4", "pool.actors.min=2", "run.limit=5", "run.limit=7"]
    merged, origins = merge(read_job(write(tmp_path, JOB), sets).layers)
    assert merged["pool"]["actors"] == {"max": 4, "min": 2}
    assert merged["run"]["limit"] == 7
    assert origins["run.limit"] == "--set run.limit"


def test_environment_variables_are_expanded_in_paths_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "corpus")
    document = {
        "input": {"path": ["s3://${BUCKET}/a", "b"], "text": "${BUCKET}"},
        "encoder": {"model": "s3://${BUCKET}/m", "templates": ["${BUCKET} {text}"]},
        "output": {"path": "s3://${BUCKET}/out"},
    }
    draft = read_job(write(tmp_path, document), ["output.path=${BUCKET}/x"])
    assert draft.get("input.path") == ["s3://corpus/a", "b"]
    assert draft.get("input.text") == "${BUCKET}"
    assert draft.get("encoder.model") == "s3://corpus/m"
    assert draft.get("encoder.templates") == ["${BUCKET} {text}"]
    assert draft.get("output.path") == "corpus/x"
    monkeypatch.delenv("BUCKET")
    with pytest.raises(ConfigError, match="BUCKET is not set"):
        read_job(write(tmp_path, document))


def test_lists_replace_lists_and_special_tokens_merge() -> None:
    low = Layer("low", {"encoder": {"templates": ["a", "b"], "special_tokens": {"eos": "append"}}})
    high = Layer("high", {"encoder": {"templates": ["c"], "special_tokens": {"bos": "none"}}})
    merged, origins = merge([low, high])
    assert merged["encoder"]["templates"] == ["c"]
    assert merged["encoder"]["special_tokens"] == {"eos": "append", "bos": "none"}
    assert origins["encoder.templates"] == "high"


def test_values_are_frozen() -> None:
    job = validate(Job, JOB)
    with pytest.raises(ValueError, match="frozen"):
        job.input.path = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2024-01-31", "2024-01-31"),
        ("2024-01-31 12:30:00", "2024-01-31 12:30:00"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("!!timestamp 2024-01-31", "2024-01-31"),
        ("2024-13-45", "2024-13-45"),
        ("12:30:00", "12:30:00"),
        ("[2024-01-31, 12:30]", ["2024-01-31", "12:30"]),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-1.5e+3", -1500.0),
        ("!!binary YWJj", "abc"),
    ],
)
def test_days_and_times_are_values_as_they_are_written(
    tmp_path: Path, written: str, meant: Any
) -> None:
    """YAML 1.1 makes dates of some, and of times a number of seconds."""
    operator = "in" if isinstance(meant, list) else "="
    path = tmp_path / "job.yaml"
    path.write_text(
        f"input: {{path: 2024-01-31, text: body, filter: [[at, {operator}, {written}]]}}\n"
        "encoder: {model: m}\noutput: {path: out}\n"
    )
    source = read_job(path)
    validate_partial(source)
    assert source.get("input.path") == "2024-01-31"
    found = validate(Input, source.layers[0].values["input"]).filter
    assert found == (["at", operator, meant],)


def test_values_of_python_stand_for_their_text() -> None:
    day, cost = datetime.datetime(2024, 1, 31, 12), Decimal("1.50")
    values = [day, day.date(), day.time(), cost, datetime.timedelta(minutes=1), b"x"]
    document = {"path": "in", "text": "t", "filter": [["a", "in", values]]}
    texts = ["2024-01-31T12:00:00", "2024-01-31", "12:00:00", "1.50", "60.000000s", "x"]
    assert validate(Input, document).filter == (["a", "in", texts],)
    with pytest.raises(ConfigError, match=r"input: got set, allowed are"):
        validate(Input, {**document, "filter": {1}}, at="input")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input: {path: a}\noutput: {path: b}\ninput: {path: c}\n", "input .* line 1 .* line 3"),
        ("run:\n  limit: 1\n  seed: 2\n  limit: 3\n", "limit .* line 2 .* line 4"),
        ("input:\n  filter: [{a: 1,\n    a: 2}]\n", "a .* line 2 .* line 3"),
        ("input: {path: a, 'path': b}\n", "path .* line 1 .* line 1"),
        ("encoder: {true: 1, yes: 2}\n", "yes .* line 1 .* line 1"),
        ("a: &x {k: 1}\nb: {<<: *x, <<: *x}\n", "<< .* line 2 .* line 2"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"job\.yaml: {said}; keep one"):
        read_job(path)


def test_a_key_that_is_given_twice_in_an_override(tmp_path: Path) -> None:
    assert "limit is given twice" in refused(write(tmp_path, JOB), "encoder.x={limit: 1, limit: 2}")


LATE = "encoder.long_text=late_chunk"
TWO = "encoder.templates=['{text}', 'Query: {text}']"
ECHO = "encoder.templates=[[{text: {}}, {literal: '; again: '}, {text: {}}]]"
APART = "encoder.templates=[{template: [{text: {}}], join: separate}]"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.span=last_token", "span: got last_token, .*allowed is all, text, from_text"),
        ("encoder.span={rule: text, offset: -1}", "span: got .*allowed is all, text, from_text"),
        ("encoder.prepare=eol", "prepare: got eol, .*allowed is none, strip"),
        (TWO, "templates: with long_text: late_chunk allowed is one template"),
        (ECHO, "templates: .* with one text in it"),
        (APART, "templates: .* joined as one string"),
    ],
)
def test_what_late_chunk_cannot_share_out_is_refused(
    tmp_path: Path, override: str, said: str
) -> None:
    path = write(tmp_path, JOB)
    validate_partial(read_job(path, [LATE]))
    validate_partial(read_job(path, [override]))
    assert re.search(said, refused(path, LATE, override))


def test_a_table_is_one_input_in_all_its_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"format": "delta", "uri": "s3://b/${TABLE}"}
    monkeypatch.setenv("TABLE", "docs")
    path = write(tmp_path, {"input": {"table": table, "text": "t"}})
    source = read_job(path, ["input.table.version=3"])
    assert source.input_paths == ("delta table s3://b/${TABLE}",)
    assert merge(source.layers)[0]["input"]["table"] == {
        "format": "delta",
        "uri": "s3://b/docs",
        "version": 3,
    }
    other = read_job(path, ["input.table.uri=./other"])
    assert other.input_paths == ("delta table ./other",)


SPLIT = "encoder.long_text=split"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.aggregation=keep", "aggregation: got keep, .*lines of a row are its passages"),
        ("encoder.word_cut=9", "word_cut drops what long_text: split"),
        ("encoder.split.overlap=300", "split: overlap: got 300, allowed is at most half"),
        ("encoder.split.carry=[a, a]", "split: carry: got a twice"),
        ("encoder.split={most: 9}", "encoder.split.most: unknown key"),
        ("encoder.split.max_tokens=0", "encoder.split.max_tokens: .*got 0"),
    ],
)
def test_what_passages_cannot_be_made_by_is_refused(
    tmp_path: Path, override: str, said: str
) -> None:
    path = write(tmp_path, JOB)
    validate_partial(read_job(path, [SPLIT]))
    assert re.search(said, refused(path, SPLIT, override))


def test_the_input_of_a_dated_folder_is_the_same_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("input: {path: ['${BUCKET}/docs/${DAY}', more]}\n")
    monkeypatch.setenv("BUCKET", "s3://corpus")
    seen = set()
    for day in ("2026-11-27", "2026-11-28"):
        monkeypatch.setenv("DAY", day)
        source = read_job(path)
        assert source.get("input.path") == [f"s3://corpus/docs/{day}", "more"]
        seen.add(source.input_paths)
    assert seen == {("${BUCKET}/docs/${DAY}", "more")}
    assert read_job(path, ["input.path=other"]).input_paths == ("other",)
