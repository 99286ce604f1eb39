"""S3 backend: list by pages, read under If-Match, create under If-None-Match."""

import errno
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

from s3fs import S3FileSystem

from embedjob.errors import AccessError
from embedjob.storage.access import PROBLEMS, error_code
from embedjob.storage.backend import Backend, Entry
from embedjob.storage.patterns import stem
from embedjob.storage.retrying import retried

# Six attempts in all (2 by s3fs, each 3 by botocore): where packets vanish, some 20 seconds.
_S3_CONFIG = {
    "connect_timeout": 3,
    "read_timeout": 20,
    "max_pool_connections": 64,
    "retries": {"mode": "standard", "total_max_attempts": 3},
}
_CONFLICT_SECONDS = (0.1, 0.3, 1.0, 3.0)
_REACHED: set[tuple[int, int]] = set()  # processes and environments whose server has answered


class S3Backend(Backend):
    """The backend of `s3://`; all threads of a process share one client."""

    checks_reads = True

    def __init__(self) -> None:
        """Take the client of this process and environment."""
        self._connection = (os.getpid(), _environment())
        self.fs: Any = _client(*self._connection)

    @property
    def reached(self) -> bool:
        """Whether this process has had an answer under its present environment."""
        return self._connection in _REACHED

    def note_reached(self) -> None:
        """Note that there was an answer."""
        _REACHED.add(self._connection)

    def entries(self, path: str, pattern: Sequence[str]) -> Iterator[Entry]:
        """Yield the files below a folder, a page at a time; none where it is missing."""
        bucket, _, key = path.partition("/")
        prefix = f"{key}/" if key else ""
        page = {"Bucket": bucket, "Prefix": prefix + stem(pattern[0] if pattern else "")}
        while True:
            answer = self._page(page)
            for item in answer.get("Contents", ()):
                # A key that ends in a slash is a folder's placeholder.
                if not item["Key"].endswith("/"):
                    yield _entry(f"{bucket}/{item['Key']}", item["Size"], item)
            if not answer.get("IsTruncated"):
                return
            page["ContinuationToken"] = answer["NextContinuationToken"]

    def _page(self, page: Mapping[str, str]) -> dict[str, Any]:
        """Return one page of a listing; each is waited for by itself, as there may be thousands."""
        bucket, call = page["Bucket"], functools.partial(self.fs.call_s3, "list_objects_v2", **page)
        try:
            answer: dict[str, Any] = retried(call, what=f"s3://{bucket}", reached=self.reached)
        except OSError as error:
            # S3 refuses a listing with a word; a bare number comes from another kind of server.
            code = error_code(error)
            if not code.isdigit() or self.reached:
                raise
            raise AccessError(f"s3://{bucket}: {PROBLEMS['NotS3']} ({code})") from error
        self.note_reached()
        return answer

    def entry(self, path: str) -> Entry | None:
        """Return the file; None for a folder."""
        bucket, _, key = path.partition("/")
        if not key:
            return None
        head = self.fs.call_s3("head_object", Bucket=bucket, Key=key)
        return _entry(path, head["ContentLength"], head)

    def read(self, path: str) -> bytes:
        """Return the whole file."""
        # One request: where more are allowed, s3fs asks for the size first.
        return cast(bytes, self.fs.cat_file(path, max_concurrency=1))

    def open(self, path: str) -> tuple[BinaryIO, str]:
        """Return a handle and the etag of what it reads."""
        # s3fs sends the etag it found here as If-Match with every read.
        handle = self.fs.open(path, "rb", cache_type="none")
        return handle, handle.details["ETag"].strip('"')

    def create(self, path: str, data: bytes) -> bool:
        """Create the file; return whether this call did."""
        for pause in _CONFLICT_SECONDS:
            try:
                self.fs.pipe_file(path, data, mode="create")
            except OSError as error:
                code = error_code(error)
                if code == "PreconditionFailed" or isinstance(error, FileExistsError):
                    return False
                # The answer to the end of a multipart put was lost, and a retry finds it ended.
                if code == "NoSuchUpload" and self.entry(path):
                    return False
                if code != "ConditionalRequestConflict":
                    raise
            else:
                return True
            # Of several puts at the same moment, S3 asks some to try again.
            time.sleep(pause)
        raise OSError(errno.EBUSY, "other writers kept putting the same key", path)

    def replace(self, path: str, data: bytes) -> None:
        """Put the file."""
        self.fs.pipe_file(path, data)

    def delete(self, path: str) -> None:
        """Remove the file."""
        self.fs.rm_file(path)


def _entry(path: str, size: int, answer: Mapping[str, Any]) -> Entry:
    return Entry(path, size, answer["ETag"].strip('"'), answer["LastModified"].timestamp())


def _environment() -> int:
    """Return a number that changes with the credentials and does not reveal them."""
    return hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.lru_cache(maxsize=4)
def _client(process: int, environment: int) -> S3FileSystem:
    """Connect one client for all threads: s3fs alone would make one for each."""
    fs = S3FileSystem(
        skip_instance_cache=True, use_listings_cache=False, config_kwargs=dict(_S3_CONFIG)
    )
    fs.retries = 2
    try:
        fs.connect()
    except ValueError as error:
        raise AccessError(
            "AWS_ENDPOINT_URL: got a value that is not a URL; allowed is http(s)://HOST"
        ) from error
    return fs
