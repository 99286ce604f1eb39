"""Storage on a real disk and against a real S3 server; nothing is mocked.

Covers: embedjob.storage.access, embedjob.storage.backend, embedjob.storage.create_only,
embedjob.storage.fsspec_backend, embedjob.storage.local, embedjob.storage.locate,
embedjob.storage.s3
"""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from embedjob.errors import AccessError, InputChangedError, OutputError
from embedjob.storage import objects
from embedjob.storage.create_only import require_create_only
from tests.seaweed import S3Server, free_ports

THREADS = 8
AWKWARD = [
    *("a b.p", "p%20c", "h#x", "q?y", "ü/é ß", "[z]/1", "s*r/t", "plus+", " x ", "quote'\"", "x:y"),
    *("a&b<c>", "k=v/k2=%2F", "emoji-😀", "semi;colon,comma", "~tilde", "...dots", "x\ty"),
]
READ_CHANGED = "is not the planned file"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on disk, then one in a bucket."""
    if request.param == "local":
        return str(tmp_path / "top")
    return objects.join(request.getfixturevalue("bucket"), "top")


def put(folder: str, *names: str) -> list[str]:
    urls = [objects.join(folder, name) for name in names]
    for url, name in zip(urls, names, strict=True):
        assert objects.create(url, name.encode())
    return urls


def names(found: list[objects.Stored], folder: str) -> list[str]:
    assert all(file.url.startswith(folder + "/") for file in found)
    return [file.url[len(folder) + 1 :] for file in found]


# Listing


def test_a_listing_says_when_each_file_was_written(place: str) -> None:
    """By the clock of the storage, in whole seconds on S3."""
    before = time.time()
    for name in ("a", "b"):
        put(place, name)
        time.sleep(1.1)
    listed = objects.find(place)
    assert [file.name for file in sorted(listed, key=lambda file: file.modified)] == ["a", "b"]
    assert all(before - 1 <= file.modified <= time.time() + 1 for file in listed)
    looked = [objects.stat(file.url) for file in listed]
    assert [file and file.modified for file in looked] == [file.modified for file in listed]


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"mtime": 12.5}, 12.5),
        ({"LastModified": datetime(1970, 1, 1, 0, 1, tzinfo=timezone.utc)}, 60.0),
        ({"updated": "1970-01-01T00:02:00.000Z"}, 120.0),
        ({"last_modified": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({}, 0.0),
    ],
)
def test_other_storage_spells_the_moment_in_its_own_way(
    info: dict[str, Any], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"name": "/a/b", "size": 1, "type": "file", **info}
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, **__: given)
    file = objects.stat("memory://a/b")
    assert file is not None
    assert file.modified == seconds


def test_awkward_names_survive_everything(place: str) -> None:
    put(place, *AWKWARD)
    listed = objects.list_files(place)
    assert names(listed, place) == sorted(AWKWARD)
    assert objects.find(place) == [file for file in listed if "/..." not in file.url]
    for file in listed:
        name = file.url[len(place) + 1 :]
        assert objects.find(file.url) == [file]
        assert objects.stat(file.url) == file
        assert objects.read_bytes(file.url) == name.encode()
        assert file.size == len(name.encode())
        with objects.open_unchanged(file) as handle:
            assert handle.read() == name.encode()
        objects.delete(file.url)
    assert objects.list_files(place) == []


def test_what_is_missing_is_empty(place: str) -> None:
    url = objects.join(place, "none")
    assert objects.find(url) == objects.list_files(url) == []
    assert objects.find(objects.join(place, "*.parquet")) == []
    assert objects.stat(url) is None
    with pytest.raises(FileNotFoundError):
        objects.read_bytes(url)
    objects.delete(url)


def test_a_folder_is_no_file(place: str) -> None:
    put(place, "a/b")
    assert objects.stat(objects.join(place, "a")) is None
    assert objects.stat(place) is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a/1.p", "a/b/2.p", "c=1/3.p", "c=2/4.p", "d.p", "e.txt"]),
        ("*.p", ["d.p"]),
        ("*", ["a/1.p", "a/b/2.p", "c=1/3.p", "c=2/4.p", "d.p", "e.txt"]),
        ("**/*.p", ["a/1.p", "a/b/2.p", "c=1/3.p", "c=2/4.p", "d.p"]),
        ("c=*", ["c=1/3.p", "c=2/4.p"]),
        ("c=[2-9]/*.p", ["c=2/4.p"]),
        ("?/", ["a/1.p", "a/b/2.p"]),
        ("a/", ["a/1.p", "a/b/2.p"]),
        ("_own/*", ["_own/6.p"]),
        ("_own", ["_own/6.p"]),
        (".hid*", [".hidden"]),
        ("a/.git/5.p", ["a/.git/5.p"]),
        ("no*", []),
    ],
)
def test_find_leaves_out_hidden_names_below_the_pattern(
    place: str, pattern: str, expected: list[str]
) -> None:
    # The root's own path is not judged.
    root = objects.join(place, "_root/.x")
    visible = ["a/1.p", "a/b/2.p", "c=1/3.p", "c=2/4.p", "d.p", "e.txt"]
    put(root, *visible, "a/.git/5.p", "_own/6.p", ".hidden", "a/_SUCCESS")
    found = objects.find(root + "/" + pattern)
    assert names(found, root) == expected
    assert found == sorted(found, key=lambda file: file.url)


def test_a_literal_name_with_wildcards_is_meant_when_it_exists(place: str) -> None:
    put(place, "x[1]*/a", "x1/b", "y?", "yz")
    assert names(objects.find(objects.join(place, "x[1]*")), place) == ["x[1]*/a"]
    assert names(objects.find(objects.join(place, "y?")), place) == ["y?"]
    assert names(objects.find(objects.join(place, "x[1]")), place) == ["x1/b"]
    assert names(objects.find(objects.join(place, "x[1]*/?")), place) == ["x[1]*/a"]


def test_a_listing_has_all_pages(s3: S3Server, bucket: str) -> None:
    # A page has a thousand.
    expected = [f"many/{i % 7}/{i:05}" for i in range(1_100)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(objects.create, (f"{bucket}/{key}" for key in expected), [b""] * 1_100))
    found = objects.list_files(bucket)
    assert names(found, bucket) == sorted(expected)
    assert len(objects.find(f"{bucket}/many/*/*7")) == 110


def test_local_spellings_are_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    put("sub", "f")
    expected = [str(tmp_path / "sub" / "f")]
    for spelling in ("sub", "./sub/", "~/sub", f"file://{tmp_path}/sub", f"{tmp_path}/sub/../sub"):
        assert [file.url for file in objects.find(spelling)] == expected
        assert objects.absolute(spelling) == str(tmp_path / "sub")
    assert objects.absolute("s3a://bucket/x/") == "s3://bucket/x"
    assert objects.join("s3://bucket/", "a/", "b") == "s3://bucket/a/b"
    assert objects.join("/", "a") == "/a"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(str(tmp_path), "elsewhere/1", "top/2")
    (tmp_path / "top" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "top" / "home").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "dangling").symlink_to(tmp_path / "nowhere")
    assert names(objects.find(str(tmp_path / "top")), str(tmp_path / "top")) == [
        *("2", "dangling", "link/1")  # what leads nowhere is a fault of an input, and so is listed
    ]


def test_links_in_an_output_are_left_out_and_its_folders_are_none(tmp_path: Path) -> None:
    put(str(tmp_path), "elsewhere/1", "top/deep/2")
    top = tmp_path / "top"
    (top / "link").symlink_to(tmp_path / "elsewhere")
    (top / "deep" / "file").symlink_to(tmp_path / "elsewhere" / "1")
    assert names(objects.list_files(str(top)), str(top)) == ["deep/2"]
    followed = objects.list_files(str(top), links=True)
    assert names(followed, str(top)) == ["deep/2", "deep/file", "link/1"]
    with pytest.raises(AccessError, match="link: is a link"):
        objects.list_files(str(top / "link"))


def test_only_regular_files_count(tmp_path: Path) -> None:
    put(str(tmp_path), "a.p", "deep.p/b")
    os.mkfifo(tmp_path / "pipe.p")
    assert names(objects.find(f"{tmp_path}/*.p"), str(tmp_path)) == ["a.p", "deep.p/b"]


@pytest.mark.parametrize("special", ["pipe", "device"])
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(special: str, tmp_path: Path) -> None:
    path = Path("/dev/zero")
    if special == "pipe":
        path = tmp_path / "_embedjob.json"
        os.mkfifo(path)
    with pytest.raises(AccessError, match=f"{path}: is a pipe or a device"):
        objects.read_bytes(str(path))


# Unchanged reads


def rewrite(file: objects.Stored) -> None:
    objects.replace(file.url, b"9" * file.size)


def remove(file: objects.Stored) -> None:
    objects.delete(file.url)


def write_in_place(file: objects.Stored) -> None:
    if file.url.startswith("s3://"):
        rewrite(file)
        return
    with open(file.url, "r+b") as handle:
        handle.write(b"9")


CHANGES = pytest.mark.parametrize("change", [rewrite, remove, write_in_place])
Change = Callable[[objects.Stored], None]


def stored(place: str, data: bytes) -> objects.Stored:
    url = objects.join(place, "file")
    assert objects.create(url, data)
    [file] = objects.list_files(place)
    # A write within one tick of the kernel's clock would leave the time of a file as it is.
    time.sleep(0.01)
    return file


@CHANGES
def test_a_file_that_changed_before_it_was_opened(place: str, change: Change) -> None:
    file = stored(place, b"0123456789")
    change(file)
    with pytest.raises(InputChangedError, match=READ_CHANGED), objects.open_unchanged(file):
        pytest.fail("it was opened")
    with pytest.raises(InputChangedError, match=READ_CHANGED):
        objects.read_tail(file, 4)


@CHANGES
def test_a_file_that_changed_between_two_reads(place: str, change: Change) -> None:
    file = stored(place, b"0123456789")

    def read() -> None:
        with objects.open_unchanged(file) as handle:
            assert handle.read(5) == b"01234"
            change(file)
            handle.read(5)

    with pytest.raises(InputChangedError, match=READ_CHANGED):
        read()


def test_an_error_of_the_reader_is_its_own_while_the_file_stands(place: str) -> None:
    file = stored(place, b"0123456789")
    with pytest.raises(ZeroDivisionError), objects.open_unchanged(file):
        _ = 1 / 0


def test_reads_are_seekable_and_exact(place: str) -> None:
    data = bytes(range(256)) * 5_000
    file = stored(place, data)
    with objects.open_unchanged(file) as handle:
        assert handle.seekable()
        assert handle.seek(-10, os.SEEK_END) == len(data) - 10
        assert handle.read() == data[-10:]
        handle.seek(1_000)
        assert handle.read(3) == data[1_000:1_003]
        assert handle.tell() == 1_003
    assert objects.read_tail(file, 7) == data[-7:]
    assert objects.read_tail(file, 10**9) == data


# Create-only


def test_the_first_put_stays(place: str) -> None:
    url = objects.join(place, "deep/er/file")
    assert objects.create(url, memoryview(b"first"))
    assert not objects.create(url, b"second")
    assert objects.read_bytes(url) == b"first"
    objects.replace(url, b"third")
    assert objects.read_bytes(url) == b"third"
    objects.delete(url)
    assert objects.create(url, bytearray(b"fourth"))
    assert names(objects.list_files(place), place) == ["deep/er/file"]


def race(action: Callable[[int], Any], threads: int) -> list[Any]:
    """What each of several threads got that started at one moment."""
    barrier = threading.Barrier(threads)

    def start(i: int) -> Any:
        barrier.wait()
        return action(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(start, range(threads)))


def create_numbered(url: str, i: int) -> bool:
    return objects.create(url, b"%d" % i * 1_000)


def claim(url: str, i: int) -> dict[str, Any]:
    return objects.create_json(url, {"token": str(i)})


def test_one_of_many_wins(place: str) -> None:
    # The S3 server makes contenders for one key wait for whole seconds: fewer of them there.
    remote = place.startswith("s3://")
    threads, rounds = (4, 4) if remote else (THREADS, 50)
    for round_ in range(rounds):
        url = objects.join(place, f"contended-{round_}")
        won = race(partial(create_numbered, url), threads)
        assert won.count(True) == 1
        assert objects.read_bytes(url) == b"%d" % won.index(True) * 1_000


def test_one_of_two_claimants_wins_and_both_know(place: str) -> None:
    for round_ in range(8):
        url = objects.join(place, f"claim-{round_}")
        seen = race(partial(claim, url), 2)
        assert seen[0] == seen[1] == json.loads(objects.read_bytes(url))
        assert [seen[i]["token"] == str(i) for i in range(2)].count(True) == 1


def test_a_multipart_put_is_create_only(s3: S3Server, bucket: str) -> None:
    url, data = f"{bucket}/big", os.urandom(101 * 2**20)
    assert objects.create(url, data)
    assert not objects.create(url, bytes(101 * 2**20))
    [file] = objects.list_files(bucket)
    assert objects.read_tail(file, 2**20) == data[-(2**20) :]
    assert objects.stat(url) == file


def test_a_lost_answer_is_a_win(place: str) -> None:
    # The put was done, its answer never came, and the client puts the same bytes again.
    url, claim = objects.join(place, "claim.json"), {"token": "mine", "holder": "me"}
    assert objects.create_json(url, claim) == claim
    assert objects.create_json(url, claim) == claim
    assert objects.create_json(url, {"holder": "another"}) == claim


def test_tokens_differ(place: str) -> None:
    urls = [objects.join(place, name) for name in ("a", "b")]
    first, second = (objects.create_json(url, {"holder": "me"}) for url in urls)
    assert first["token"] != second["token"]
    assert objects.create_json(urls[0], {"holder": "me"}) == first


def test_a_claim_that_is_not_json_is_told(place: str) -> None:
    [url] = put(place, "not json")
    with pytest.raises(OutputError, match="not JSON"):
        objects.create_json(url, {})


FULL_DISK = """
import os, resource, sys
from embedjob.storage import objects
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for put in (objects.create, objects.replace):
    try:
        put(sys.argv[1], bytes(1_000_000))
    except OSError as error:
        print(error.errno)
"""


def test_a_put_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the size of files ends a write in the middle, as a full disk does.
    url = str(tmp_path / "out" / "file")
    command = [sys.executable, "-c", FULL_DISK, url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["27", "27"]
    assert objects.list_files(str(tmp_path)) == []
    assert objects.create(url, bytes(1_000_000))


def test_temporary_files_lie_at_the_top_of_a_probed_output(tmp_path: Path) -> None:
    require_create_only(str(tmp_path))
    put(str(tmp_path), "data/fingerprint/file")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["fingerprint", "file"]
    assert os.listdir(tmp_path / ".embedjob-tmp") == []


# Places


class Forgetful(MemoryFileSystem):  # type: ignore[misc]
    """A store that overwrites whatever it is told."""

    protocol = "forgetful"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "", **kwargs: Any) -> None:
        super().pipe_file(path, value)


class Hasty(Forgetful):
    """A store that looks first and puts then."""

    protocol = "hasty"

    def pipe_file(self, path: str, value: bytes, mode: str = "", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        time.sleep(0.01)
        super().pipe_file(path, value)


class Careful(Forgetful):
    """A store that keeps what was there."""

    protocol = "careful"
    lock = threading.Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "", **kwargs: Any) -> None:
        with self.lock:
            if mode == "create" and self.exists(path):
                raise FileExistsError(path)
            super().pipe_file(path, value)


class Unheard(Careful):
    """A careful store whose answer to whoever came first is lost, so that it asks again."""

    protocol = "unheard"

    def pipe_file(self, path: str, value: bytes, mode: str = "", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode, **kwargs)
        raise FileExistsError(path)


@pytest.fixture(autouse=True)
def stores() -> None:
    for store in (Forgetful, Hasty, Careful, Unheard):
        fsspec.register_implementation(store.protocol, store, clobber=True)


def test_a_place_that_creates_once_is_accepted_and_left_as_it_was(place: str) -> None:
    require_create_only(place)
    assert objects.list_files(place) == []
    require_create_only("careful://out")
    assert objects.list_files("careful://out") == []


def test_a_lost_answer_is_not_taken_for_a_lost_race() -> None:
    require_create_only("unheard://out")
    assert objects.list_files("unheard://out") == []


@pytest.mark.parametrize(
    "url", ["forgetful://out", "hasty://out", "memory://out", "http://a.invalid/o"]
)
def test_a_place_that_does_not_is_refused(url: str) -> None:
    with pytest.raises(OutputError):
        require_create_only(url)


def test_any_other_filesystem_is_read(tmp_path: Path) -> None:
    urls = put("careful://in", "a/1", "_b", "c")
    assert objects.find("careful://in") == objects.find("careful://in/*")
    assert objects.find("careful://in/c*") == objects.find("careful://in/c") != []
    objects.download(objects.find("careful://in/a")[0], tmp_path / "a" / "1")
    assert (tmp_path / "a" / "1").read_bytes() == b"a/1"
    assert names(objects.find("careful://in"), "careful://in") == ["a/1", "c"]
    file = objects.stat(urls[2])
    assert file
    assert objects.read_tail(file, 1) == b"c"
    objects.replace(file.url, b"d")
    with pytest.raises(InputChangedError), objects.open_unchanged(file):
        pytest.fail("it was opened")
    assert objects.list_files("careful://none") == []


@pytest.mark.parametrize("url", ["nosuch://x/y", "s3://key:secret@bucket/x"])
def test_a_url_that_cannot_be_used_is_told(url: str) -> None:
    with pytest.raises(AccessError) as caught:
        objects.find(url)
    assert "secret" not in str(caught.value)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    [url] = put(str(tmp_path), "file")
    with pytest.raises(AccessError, match="Not a directory"):
        require_create_only(f"{url}/out")


def test_download_copies_a_listed_file_and_no_other(place: str, tmp_path: Path) -> None:
    data = os.urandom(20 * 2**20)
    url = objects.join(place, "model/weights")
    objects.create(url, data)
    [listed] = objects.list_files(objects.join(place, "model"))
    objects.download(listed, tmp_path / "to" / "weights")
    assert (tmp_path / "to" / "weights").read_bytes() == data
    objects.replace(url, data[:-1])
    with pytest.raises(InputChangedError):
        objects.download(listed, tmp_path / "to" / "again")


# Access


class NotS3(BaseHTTPRequestHandler):
    """A web page, whatever is asked."""

    def do_GET(self) -> None:
        body = b"<!doctype html><meta charset=utf-8><p>hello"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_HEAD = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), NotS3) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SECRET = "s3cr3t-never-shown"
TROUBLE: dict[str, dict[str, str | None]] = {
    "unknown key": {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": SECRET},
    "wrong secret": {"AWS_SECRET_ACCESS_KEY": SECRET},
    "no keys": {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    "half a key": {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": SECRET},
    "no profile": {"AWS_PROFILE": "none-such"},
    "refused": {"AWS_ENDPOINT_URL": "refused"},
    "no host": {"AWS_ENDPOINT_URL": "http://host.invalid"},
    "no URL": {"AWS_ENDPOINT_URL": "nonsense"},
    "not S3": {"AWS_ENDPOINT_URL": "web"},
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_one_readable_error_in_seconds(
    trouble: str, s3: S3Server, bucket: str, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"refused": f"http://127.0.0.1:{free_ports(1)[0]}", "web": web}
    for name, value in TROUBLE[trouble].items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, known.get(value, value))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    start = time.monotonic()
    for action in (objects.find, require_create_only):
        with pytest.raises(AccessError) as caught:
            action(bucket)
        assert "\n" not in str(caught.value)
        shown = "".join(traceback.format_exception(caught.value))
        assert SECRET not in shown
        assert s3.secret_key not in shown
    assert time.monotonic() - start < 20


def test_a_bucket_that_does_not_exist_is_named(s3: S3Server) -> None:
    url = "s3://no-such-bucket/x"
    for action in (
        objects.find,
        objects.list_files,
        require_create_only,
        objects.read_bytes,
    ):
        with pytest.raises(AccessError, match=r"no-such-bucket.*does not exist"):
            action(url)
    for action in (objects.find, objects.list_files):
        with pytest.raises(AccessError, match="not allowed for a bucket"):
            action("s3://")
        with pytest.raises(AccessError):
            action("s3://*/x")


# Processes


def work(url: str) -> None:
    [file] = objects.list_files(url)
    with objects.open_unchanged(file) as handle:
        assert handle.read() == b"seed"
    assert objects.create(objects.join(url, f"by-{os.getpid()}"), b"")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_has_its_own_client(place: str, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    put(place, "seed")
    assert len(objects.list_files(place)) == 1
    child = context.Process(target=work, args=(place,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert len(objects.list_files(place)) == 2
