"""Decoders: processes that decode footers for a driver, which must outlive every one of them.

Arrow ends its process on some damage. A file whose footer ends two of them is at fault; the next
file gets a new process.
"""

import os
import pickle
import queue
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from embedjob.errors import FaultError
from embedjob.input.footers import Decoder, Footer, Wanted

Decode = Callable[[bytes, int], Footer]
PATIENCE_SECONDS = 120.0
_ATTEMPTS = 2  # a process may be ended from outside, too
_FILES_PER_PROCESS = 250
_MAX_PROCESSES = 4
_MAX_WORDS = 200
# Neither `site` nor numpy, which Arrow imports where it is: both together take 0.2 s.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[1:]
sys.modules["numpy"] = None
from embedjob.input.decoders import serve
serve()
"""


class _LostError(Exception):
    """The process ended, or did not answer in time."""


@contextmanager
def decoders(wanted: Wanted, *, files: int, patience: float = PATIENCE_SECONDS) -> Iterator[Decode]:
    """Give a function that decodes the last bytes of a file of some size, as many threads like.

    It raises ArrowInvalid where a footer makes no sense, ended two processes, or kept each busy for
    more than `patience` seconds.

    Raises:
        FaultError: no process can be started here.
    """
    count = min(1 + files // _FILES_PER_PROCESS, _MAX_PROCESSES, os.cpu_count() or 1)
    seats: queue.LifoQueue[_Process | None] = queue.LifoQueue()
    for _ in range(count):
        seats.put(None)

    def decode(tail: bytes, size: int) -> Footer:
        for _ in range(_ATTEMPTS):
            process = seats.get()
            try:
                process = process or _Process(wanted, patience)
                return process.decode(tail, size)
            except _LostError as error:
                if process:
                    process.end()
                process, reason = None, str(error)
            finally:
                seats.put(process)
        raise pa.ArrowInvalid(f"its footer cannot be decoded: {reason}; write the file again")

    try:
        yield decode
    finally:
        for _ in range(count):
            process = seats.get()
            if process:
                process.end()


class _Process:
    """One process that decodes; it ends with its driver, since it reads from a pipe."""

    def __init__(self, wanted: Wanted, patience: float) -> None:
        self._patience = patience
        package = str(Path(__file__).parents[2])
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, package, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is for the driver, which ends this process itself.
            start_new_session=True,
        )
        try:
            self._ask(wanted, PATIENCE_SECONDS)
        except _LostError as error:
            self.end()
            raise FaultError(
                f"a process that decodes footers did not start ({error}): got {sys.executable};"
                " check that it is a Python in which embedjob and pyarrow are installed"
            ) from error

    def decode(self, tail: bytes, size: int) -> Footer:
        """Return a footer; ArrowInvalid where it makes no sense, _LostError where it ended this."""
        answer = self._ask((tail, size), self._patience)
        if isinstance(answer, str):
            raise pa.ArrowInvalid(answer)
        rows, text_bytes, schema, length = answer
        return Footer(rows, text_bytes, _schema(schema), length)

    def end(self) -> None:
        """End the process, and free what it held."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._child.stderr):
            if stream:
                with suppress(OSError):  # what was not sent any more
                    stream.close()

    def _ask(self, question: Any, patience: float) -> Any:
        """Return the answer; _LostError where none comes."""
        questions, answers = self._child.stdin, self._child.stdout
        assert questions is not None
        assert answers is not None
        ready = select.poll()
        ready.register(answers, select.POLLIN)
        try:
            pickle.dump(question, questions)
            questions.flush()
            if not ready.poll(patience * 1000):
                raise _LostError(f"no answer for {patience:g} s")
            return pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise _LostError(self._last_words()) from error

    def _last_words(self) -> str:
        """Return how the process ended, and what it wrote before."""
        self._child.kill()  # where it has ended already, its own code stays
        code = self._child.wait()
        assert self._child.stderr is not None
        written = self._child.stderr.read().decode(errors="replace").split()
        ended = f"signal {-code}" if code < 0 else f"code {code}"
        return f"the process that did ended by {ended}: {' '.join(written)[:_MAX_WORDS]}"


def serve() -> None:
    """Answer with a footer, or with what is wrong, for as long as somebody asks: a process's work.

    The first message names the wanted columns.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Only answers may go into the pipe, whoever prints.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    decoder = Decoder(pickle.load(questions))
    _answer(answers, None)
    with suppress(EOFError):
        while True:
            tail, size = pickle.load(questions)
            _answer(answers, _decoded(decoder, tail, size))


def _answer(answers: BinaryIO, answer: Any) -> None:
    pickle.dump(answer, answers)
    answers.flush()


def _decoded(decoder: Decoder, tail: bytes, size: int) -> tuple[Any, ...] | str:
    try:
        footer = decoder.decode(tail, size)
    except pa.ArrowInvalid as error:
        return str(error)
    # A schema travels as bytes, so that equal ones are made once.
    schema = footer.schema.serialize().to_pybytes()
    return footer.group_rows, footer.group_text_bytes, schema, footer.length


@lru_cache(maxsize=4096)
def _schema(serialized: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(serialized))
