"""A dataset on the Hugging Face hub is a folder of files at a revision.

There is no hub here: a real server speaks as much of its protocol as huggingface_hub's filesystem
asks for (revision, tree, paths-info, resolve with ranges). What was listed is what is read: a file
that another commit replaced meanwhile is refused, though the client keeps listings.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
REVISIONS = ("main", "v1", "refs/convert/parquet")
PROGRAM = """
import json, sys
from embedjob.config.job import Input
from embedjob.errors import EmbedjobError
from embedjob.input.reading import read_chunk
from embedjob.job.input_listing import list_input
from embedjob.job.planning import cut_input
asked = json.loads(sys.argv[1])
job_input = Input(path=asked["path"], text="t", id="n")
try:
    listing = list_input(job_input)
    cut = cut_input(job_input, listing, chunk_rows=2, fingerprint="0" * 64)
    print(json.dumps({"shards": [[one.url, one.etag] for one in listing.shards]}), flush=True)
    input()  # the test may change the hub now
    tables = [read_chunk(chunk, job_input) for chunk in cut.chunks]
    rows = [[row["id"], row["text"]] for table in tables for row in table.to_pylist()]
    print(json.dumps({"rows": rows, "unread": listing.unread}))
except EmbedjobError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


class Hub(ThreadingHTTPServer):
    """Serves the dataset us/docs: files by revision."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, dict[str, bytes]] = {revision: {} for revision in REVISIONS}
        self.bytes_sent = 0
        self.refuses: int | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if self.server.refuses:
            return self._send(self.server.refuses, b"", {})
        for revision, files in self.server.files.items():
            if path == f"/api/datasets/us/docs/revision/{revision}":
                self._json({"id": "us/docs", "sha": "0" * 40, "siblings": []})
            elif path.startswith(tree := f"/api/datasets/us/docs/tree/{revision}"):
                self._tree(files, path.removeprefix(tree).strip("/"))
            elif path.startswith(resolved := f"/datasets/us/docs/resolve/{revision}/"):
                self._file(files.get(path.removeprefix(resolved)))
            else:
                continue
            return None
        if path == "/api/datasets/us/docs":
            return self._json({"id": "us/docs", "sha": "0" * 40, "siblings": []})
        return self._lost("RevisionNotFound" if "/us/docs/" in path else "RepoNotFound")

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        asked = parse_qs(self.rfile.read(length).decode())
        revision = unquote(self.path).rpartition("/paths-info/")[2]
        files = self.server.files[revision]
        self._json([_entry(name, files[name]) for name in asked["paths"] if name in files])

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        below = {n: d for n, d in files.items() if not folder or n.startswith(f"{folder}/")}
        if "recursive=true" not in self.path.lower():
            base = f"{folder}/" if folder else ""
            below = {n: d for n, d in below.items() if "/" not in n.removeprefix(base)}
        if not below:
            return self._lost("EntryNotFound")
        return self._json([_entry(name, data) for name, data in below.items()])

    def _file(self, data: bytes | None) -> None:
        if data is None:
            return self._lost("EntryNotFound")
        begin, end = self.headers.get("Range", f"bytes=0-{len(data)}").split("=")[1].split("-")
        part = data[int(begin) : int(end or len(data)) + 1]
        self.server.bytes_sent += len(part)
        return self._send(206 if "Range" in self.headers else 200, part, {})

    def _lost(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the hub describes it: a large one by the hash of its pointer."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": name, "oid": oid, "size": len(data)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()


class Asked:
    """A process that lists an input, waits, and reads it."""

    def __init__(self, hub: Hub, folder: Path, path: str) -> None:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(folder / "hf"),
            "PYTHONPATH": str(ROOT),
            "no_proxy": "127.0.0.1",
        }
        self._child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps({"path": path})],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout is not None
        self.first: dict[str, Any] = json.loads(self._child.stdout.readline())

    def rest(self) -> dict[str, Any]:
        out, _ = self._child.communicate("\n", timeout=120)
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer


def _parquet(first: int, rows: int) -> bytes:
    table = pa.table(
        {"t": [f"text {first + i}" for i in range(rows)], "n": range(first, first + rows)}
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _fill(files: dict[str, bytes], first: int) -> None:
    files["README.md"] = b"about"
    files["data/a.parquet"] = _parquet(first, 3)
    files["data/sub folder/b.parquet"] = _parquet(first + 3, 5)
    files["other/c.jsonl"] = b'{"t": "line", "n": 1}\n'


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("@main/data", 0),
        ("/data", 0),
        ("@v1", 100),
        ("@refs%2Fconvert%2Fparquet/data/*.parquet", 200),
        ("@v1/data/**/b.parquet", 103),
    ],
)
def test_a_dataset_is_a_folder_at_its_revision(
    hub: Hub, tmp_path: Path, path: str, first: int
) -> None:
    for number, revision in enumerate(REVISIONS):
        _fill(hub.files[revision], 100 * number)
    asked = Asked(hub, tmp_path, f"hf://datasets/us/docs{path}")
    rows = asked.rest()["rows"]
    count = 5 if path.endswith("b.parquet") else 3 if "*" in path else 8
    assert rows == [[n, f"text {n}"] for n in range(first, first + count)]
    assert all(url.startswith("hf://datasets/us/docs") for url, _ in asked.first["shards"])


def test_lines_are_read_as_well(hub: Hub, tmp_path: Path) -> None:
    _fill(hub.files["main"], 0)
    assert Asked(hub, tmp_path, "hf://datasets/us/docs/other").rest()["rows"] == [[1, "line"]]


def test_another_commit_is_another_shard_and_never_read_as_the_planned_one(
    hub: Hub, tmp_path: Path
) -> None:
    _fill(hub.files["main"], 0)
    before = Asked(hub, tmp_path, "hf://datasets/us/docs/data")
    # As large as it was, so that nothing but its hash says so.
    changed = hub.files["main"]["data/a.parquet"].replace(b"text 0", b"text X")
    assert changed != hub.files["main"]["data/a.parquet"]
    assert len(changed) == len(hub.files["main"]["data/a.parquet"])
    hub.files["main"]["data/a.parquet"] = changed
    said = before.rest()["error"]
    assert said.startswith("InputChangedError: hf://datasets/us/docs/data/a.parquet: is not the")
    after = Asked(hub, tmp_path, "hf://datasets/us/docs/data")
    pairs = zip(before.first["shards"], after.first["shards"], strict=True)
    assert [old != new for old, new in pairs] == [True, False]
    after.rest()


@pytest.mark.parametrize("path", ["us/docs@v2/data", "us/nowhere", "us/docs/nothing"])
def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path, path: str) -> None:
    _fill(hub.files["main"], 0)
    error = Asked(hub, tmp_path, f"hf://datasets/{path}").first["error"]
    assert error.startswith(f"InputError: input.path: no Parquet file at hf://datasets/{path}")


@pytest.mark.parametrize("status", [401, 500])
def test_a_hub_that_refuses_or_breaks_is_said(hub: Hub, tmp_path: Path, status: int) -> None:
    _fill(hub.files["main"], 0)
    hub.refuses = status
    error = Asked(hub, tmp_path, "hf://datasets/us/docs/data").first["error"]
    if status == 401:
        # As a private dataset looks to whoever may not see it.
        assert error.startswith(("InputError: input.path: no Parquet file", "AccessError: hf://"))
    else:
        assert error.startswith("AccessError: hf://datasets/us/docs/data: the hub did not answer")
        assert "HF_ENDPOINT" in error


def test_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path) -> None:
    table = pa.table({"t": ["a", "b"], "n": [1, 2], "big": [os.urandom(2**21)] * 2})
    sink = io.BytesIO()
    pq.write_table(table, sink, use_dictionary=False, compression="none")
    hub.files["main"]["data/a.parquet"] = sink.getvalue()
    Asked(hub, tmp_path, "hf://datasets/us/docs/data").rest()
    assert hub.bytes_sent < len(sink.getvalue()) / 4
