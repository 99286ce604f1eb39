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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from embedjob.errors import FaultError
from embedjob.input.chunks import WHOLE_BUT
from embedjob.input.footers import Decoder, Footer, Tail, Wanted

DecodesFooters = Callable[[Sequence[Tail]], list[Footer | str]]
PATIENCE_SECONDS = 120.0
_ATTEMPTS = 2  # a process may be ended from outside, too
_FILES_PER_PROCESS = 250
_MAX_PROCESSES = 4
_MAX_WORDS = 200
_ENCRYPTED = "Cannot decrypt ColumnMetadata"  # Arrow's last words
_ENDING_SECONDS = 5.0
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
def decoders(
    wanted: Wanted, *, files: int, patience: float = PATIENCE_SECONDS
) -> Iterator[DecodesFooters]:
    """Give a function that returns footers, or what is wrong with them; threads may share it.

    A footer is wrong that makes no sense, that ended two processes, or that kept each busy for more
    than `patience` seconds.

    Raises:
        FaultError: no process can be started here.
    """
    processes = _Processes(
        wanted, min(1 + files // _FILES_PER_PROCESS, _MAX_PROCESSES, os.cpu_count() or 1), patience
    )
    try:
        yield processes.decode
    finally:
        processes.end()


class _Processes:
    """Some processes, each started when it is first needed, and again when it was lost."""

    def __init__(self, wanted: Wanted, count: int, patience: float) -> None:
        self._wanted = wanted
        self._count = count
        self._patience = patience
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def decode(self, tails: Sequence[Tail]) -> list[Footer | str]:
        """Return footers, or what is wrong with them: with each alone, where a process is lost."""
        alone, reason = len(tails) == 1, ""
        for _ in range(_ATTEMPTS if alone else 1):
            try:
                return self._attempt(tails)
            except _LostError as error:
                reason = str(error)
        if alone and _ENCRYPTED in reason:
            return [
                f"{WHOLE_BUT} has an encrypted column that this job needs, which is not supported;"
                " decrypt the file"
            ]
        if alone:
            return [f"its footer cannot be decoded: {reason}; write the file again"]
        return [footer for tail in tails for footer in self.decode([tail])]

    def end(self) -> None:
        """End all processes, once no thread uses one any more."""
        for _ in range(self._count):
            process = self._idle.get()
            if process:
                process.end()

    def _attempt(self, tails: Sequence[Tail]) -> list[Footer | str]:
        process = self._idle.get()
        try:
            process = process or _Process(self._wanted, self._patience)
            return process.decode(tails)
        except _LostError:
            if process:
                process.end()
            process = None
            raise
        finally:
            self._idle.put(process)


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

    def decode(self, tails: Sequence[Tail]) -> list[Footer | str]:
        """Return footers, or what is wrong with them; _LostError where one ended this."""
        return [
            answer if isinstance(answer, str) else _received(*answer)
            for answer in self._ask(tails, self._patience)
        ]

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
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(_ENDING_SECONDS)
        self._child.kill()  # where it has ended by itself, its own code stays
        code = self._child.wait()
        assert self._child.stderr is not None
        written = self._child.stderr.read().decode(errors="replace").split()
        ended = f"signal {-code}" if code < 0 else f"code {code}"
        return f"the process that did ended by {ended}: {' '.join(written)[:_MAX_WORDS]}"


def serve() -> None:
    """Answer with footers, or with what is wrong, for as long as somebody asks: a process's work.

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
            footers = decoder.decode_all(pickle.load(questions))
            _answer(answers, [_sent(footer) for footer in footers])


def _answer(answers: BinaryIO, answer: Any) -> None:
    pickle.dump(answer, answers)
    answers.flush()


def _sent(footer: Footer | str) -> tuple[Any, ...] | str:
    """Return a footer as it travels: its schema as bytes, so that equal ones are made once."""
    if isinstance(footer, str):
        return footer
    schema, fine = footer.schema.serialize().to_pybytes(), None
    if footer.fine_schema is not None:
        fine = footer.fine_schema.serialize().to_pybytes()
    return footer.group_rows, footer.group_text_bytes, schema, footer.length, fine


def _received(
    rows: tuple[int, ...],
    text_bytes: tuple[int, ...],
    schema: bytes,
    length: int,
    fine: bytes | None,
) -> Footer:
    return Footer(rows, text_bytes, _schema(schema), length, fine and _schema(fine))


@lru_cache(maxsize=4096)
def _schema(serialized: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(serialized))
