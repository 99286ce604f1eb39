"""A process that is given the bytes of shards, and answers with their rows or their fault.

It plans as a driver does and reads as a worker does, so that what ends either is seen as an end.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedjob.config.job import Input
from embedjob.errors import EmbedjobError
from embedjob.input.columns import columns_of
from embedjob.input.decoders import DecodesFooters, decoders
from embedjob.input.listing import find_files, read_batch
from embedjob.input.reading import read_chunk
from embedjob.job.input_listing import InputListing
from embedjob.job.planning import cut_input
from tests.cluster import ROOT

CHUNK_ROWS = 40
Answer = tuple[str, Any]


class Reader:
    """The process; a new one takes the place of one that ended."""

    def __init__(self) -> None:
        self._start()

    def read(self, shard: bytes) -> Answer:
        """Return ("rows", rows), ("fault", reason), or how it broke: "traceback" or "ended"."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            pickle.dump(shard, self._child.stdin)
            self._child.stdin.flush()
            return pickle.load(self._child.stdout)
        except (OSError, EOFError):
            code = self._child.wait()
            self._start()
            return ("ended", code)

    def end(self) -> None:
        self._child.kill()
        self._child.wait()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.input.damaged"]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT)


def _answer(path: Path, job_input: Input, decode: DecodesFooters) -> Answer:
    (shard,) = find_files(str(path)).shards
    listing = InputListing((shard,), read_batch([shard.stored], decode))
    try:
        cut = cut_input(job_input, listing, chunk_rows=CHUNK_ROWS, fingerprint="0" * 64)
        for _, reason in cut.faults:
            return ("fault", reason)
        read = [read_chunk(chunk, job_input) for chunk in cut.chunks]
    except EmbedjobError as error:
        return ("fault", str(error))
    return ("rows", [row for rows in read for row in rows.to_pylist()])


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder, suppress(EOFError):
        path = Path(folder, "a.parquet")
        # A filter that looks at the bounds in the footer, and leaves out nothing by them.
        passing = (("n", "!=", -1),)
        job_input = Input(path=str(path), text="t", id="n", keep=("k", "nested"), filter=passing)
        with decoders(columns_of(job_input).wanted, files=1) as decode:
            while True:
                path.unlink(missing_ok=True)  # another inode: another etag
                path.write_bytes(pickle.load(sys.stdin.buffer))
                try:
                    answer = _answer(path, job_input, decode)
                except BaseException:
                    answer = ("traceback", traceback.format_exc())
                pickle.dump(answer, answers)
                answers.flush()


if __name__ == "__main__":
    main()
