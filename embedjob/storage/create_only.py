"""Create-only test: check that storage lets exactly one of several writers create a file."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from embedjob.errors import AccessError, OutputError
from embedjob.storage.access import access_errors
from embedjob.storage.local import LocalBackend
from embedjob.storage.locate import locate
from embedjob.storage.objects import create, delete, holds, join, read_bytes

_RACERS = 4


def require_create_only(directory: str) -> None:
    """Check that files can be listed and created here, each by exactly one of several writers.

    OutputError where they cannot, AccessError where storage refuses.
    """
    backend, path, prefix = locate(directory)
    if prefix == "memory://":
        raise OutputError(
            f"{directory}: got the memory of one process, which no other process sees; "
            "use a directory or S3"
        )
    if isinstance(backend, LocalBackend):
        with access_errors(directory):
            backend.make_scratch(path)
    try:
        # Report a missing bucket here: some servers make it at the first put.
        holds(directory)
        made = _race(join(directory, f".embedjob-probe-{secrets.token_hex(8)}"))
    except (OSError, NotImplementedError, TypeError, ValueError) as error:
        raise OutputError(f"{directory}: cannot create a file here: {error}") from error
    if made.count(True) != 1:
        raise OutputError(
            f"{directory}: {made.count(True)} of {len(made)} writers created the same file here, "
            "allowed is exactly one; use S3 or a filesystem that can create without overwriting"
        )


def _race(url: str) -> list[bool]:
    """Let several writers and one latecomer create a file; return who did, and delete the file."""
    marks = [secrets.token_bytes(16) for _ in range(_RACERS)]
    try:
        with ThreadPoolExecutor(_RACERS) as pool:
            made = list(pool.map(create, [url] * _RACERS, marks))
        if not any(made):
            # The answer to the winner's put was lost, and the retry found the name taken.
            made[marks.index(read_bytes(url))] = True
        return [*made, create(url, b"late")]
    finally:
        # Without the right to delete, the probe stays; a run does not need that right.
        with suppress(AccessError, OSError, NotImplementedError):
            delete(url)
