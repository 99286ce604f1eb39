"""The hub's client against a small real server that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.encoder import tiny
from tests.encoder.adapting import save_adapter

PARAMETERS = sum(p.numel() for p in tiny.model("llama").parameters())
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from dataclasses import asdict
from embedjob.models.digests import file_digests
from embedjob.models.architecture import model_info
from embedjob.models.source import ModelSource, materialize, pinned
from embedjob.errors import ModelError
source = ModelSource(**{"model": "us/tiny", **json.loads(sys.argv[1])})
try:
    answer = {
        "facts": asdict(model_info(source)),
        "digests": file_digests(source),
        "revision": pinned(source).revision,
    }
    answer["before"] = sorted(p.name for p in materialize(source, tokenizer_only=True).iterdir())
    answer["after"] = sorted(p.name for p in materialize(source).iterdir())
except ModelError as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
"""

ASK_PARTS = """
import json, sys
from embedjob.models.digests import model_digests
from embedjob.models.components import components_of
from embedjob.models.source import materialize
from embedjob.config.job_file import recipe_from
recipe = recipe_from({"model": "us/tiny", **json.loads(sys.argv[1])}, {})
parts = components_of(recipe).pinned()
answer = {"digests": model_digests(parts)}
answer["recipe"] = recipe.model_copy(update=parts.keys()).model_dump(mode="json")
answer["brought"] = [sorted(p.name for p in materialize(one).iterdir()) for one in parts.adapters]
print(json.dumps(answer))
"""


class Hub(ThreadingHTTPServer):
    """Serves one repository, us/tiny, and remembers what was fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.fetched = files, set[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/us/tiny/tree/"):
            self._json([_entry(name, data) for name, data in self.server.files.items()])
        elif path.startswith("/api/models/us/tiny"):
            self._json(_record(self.server.files))
        elif path.startswith("/us/tiny/resolve/") and path.split("/", 5)[5] in self.server.files:
            self._file(path.split("/", 5)[5])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""

    def _json(self, document: Any) -> None:
        self._send(json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        if self.command == "GET":
            self.server.fetched.add(name)
        etag = hashlib.sha256(data).hexdigest()
        self._send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    sha = hashlib.sha256(data).hexdigest()
    large = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 134}
    lfs = {"lfs": large} if name.endswith((".safetensors", ".bin")) else {}
    return {"type": "file", "path": name, "oid": sha[:40], "size": len(data), **lfs}


def _record(files: dict[str, bytes]) -> dict[str, Any]:
    siblings = [{**_entry(name, data), "rfilename": name} for name, data in files.items()]
    counts = {"parameters": {"F32": PARAMETERS}, "total": PARAMETERS}
    return {"id": "us/tiny", "sha": COMMIT, "siblings": siblings, "safetensors": counts}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = tiny.save("llama", tmp_path / "llama")
    extra = {"README.md": b"hello", "onnx/model.json": b"{}"}
    return {path.name: path.read_bytes() for path in folder.iterdir()} | extra


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    server = Hub(files)
    yield server
    server.shutdown()


def ask(hub: Hub, tmp_path: Path, *, program: str = ASK, **source: Any) -> dict[str, Any]:
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "EMBEDJOB_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-c", program, json.dumps(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_hub_model_is_described_before_its_weights_are_fetched(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    answer = ask(hub, tmp_path)
    decisive = ("config.json", "model.safetensors", "tokenizer.json")
    assert answer["digests"] == {name: hashlib.sha256(files[name]).hexdigest() for name in decisive}
    assert answer["facts"]["parameters"] == PARAMETERS
    assert answer["revision"] == COMMIT
    assert "model.safetensors" not in answer["before"]
    assert "model.safetensors" in answer["after"]
    assert hub.fetched == {n for n in files if n.endswith((".json", ".safetensors"))} - {
        "onnx/model.json"
    }


def test_a_snapshot_that_is_here_serves_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    online = ask(hub, tmp_path, revision=COMMIT)
    hub.shutdown()
    hub.server_close()
    assert ask(hub, tmp_path, revision=COMMIT) == {**online, "before": online["after"]}


def test_the_modules_of_heads_come_with_their_model(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    files |= {"2_Dense/config.json": b"{}", "2_Dense/pytorch_model.bin": b"weights"}
    answer = ask(hub, tmp_path, modules=["2_Dense"], allow_pickle=True)
    found = {name for name in answer["digests"] if name.startswith("2_Dense/")}
    assert found == {"2_Dense/config.json", "2_Dense/pytorch_model.bin"}
    assert "2_Dense/pytorch_model.bin" in hub.fetched


def test_pickles_are_fetched_only_when_allowed(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    assert "allow_pickle" in ask(hub, tmp_path)["error"]
    assert "pytorch_model.bin" not in hub.fetched
    assert "pytorch_model.bin" in ask(hub, tmp_path, allow_pickle=True)["after"]


def test_a_model_that_the_hub_does_not_have_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    assert "us/tiny has no config.json; found: nothing" in ask(hub, tmp_path)["error"]
    assert "could not be had from the Hugging Face hub" in ask(hub, tmp_path, model="us/x")["error"]


def test_an_adapter_of_the_hub_is_pinned_with_its_base(hub: Hub, tmp_path: Path) -> None:
    """The hub's repository is an adapter, the model under it is a directory."""
    adapter = save_adapter(tmp_path / "a", 1, base_model_name_or_path=str(tmp_path / "llama"))
    for path in adapter.iterdir():
        hub.files[path.name] = path.read_bytes()
    weights = hub.files.pop("model.safetensors")
    hub.files["checkpoint-5/adapter_model.safetensors"] = b"of a time before"
    named = {"id": "us/tiny", "revision": COMMIT}
    answer = ask(hub, tmp_path, program=ASK_PARTS)
    place = {key: answer["recipe"][key] for key in ("model", "revision", "base", "adapters")}
    assert place == {
        "model": "us/tiny",
        "revision": COMMIT,
        "base": str(tmp_path / "llama"),
        "adapters": [],
    }
    expected = hashlib.sha256(hub.files["adapter_model.safetensors"]).hexdigest()
    assert answer["digests"]["adapters/0/adapter_model.safetensors"] == expected
    assert answer["digests"]["base/model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert "adapter_model.safetensors" in answer["brought"][0]
    assert "checkpoint-5/adapter_model.safetensors" not in hub.fetched
    explicit = {"model": str(tmp_path / "llama"), "adapters": ["us/tiny"]}
    again = ask(hub, tmp_path, program=ASK_PARTS, **explicit)
    assert again["recipe"]["adapters"] == [named]
    assert again["digests"]["adapters/0/adapter_model.safetensors"] == expected
