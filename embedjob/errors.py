"""Error classes by exit code: refused (2), faults (1), interrupted (3)."""

import sys


class EmbedjobError(Exception):
    """A message for the person who runs the job: what was got, what is allowed, what to do."""

    exit_code = 1


def in_one_line(error: BaseException, *, most: int = 200) -> str:
    """Return an error's type and at most `most` characters of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def amount(number: int, noun: str) -> str:
    """Return a number with its noun: `1 file`, `2,000 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lacking_module(error: ModuleNotFoundError) -> str:
    """Return in one line which Python lacks a module of ours, and the two ways out."""
    return (
        f"embedjob: {sys.executable} has no module {error.name}: it is not the Python of an"
        " environment that embedjob is installed in. A submitted job runs in the Python that Ray"
        " was started from: start Ray from that environment, or give it to the job as a runtime_env"
        " (pip, uv, conda or image_uri)"
    )


class RefusedError(EmbedjobError):
    """The job does not fit its world; nothing was embedded."""

    exit_code = 2


class ConfigError(RefusedError):
    """The job file, a method file or an override cannot be used as it is."""


class InputError(RefusedError):
    """The input is missing, is not Parquet, or lacks what the job asks of it."""


class ModelError(RefusedError):
    """The model cannot be found, read, or combined with the recipe."""


class AccessError(RefusedError):
    """Storage refused these credentials, or this place cannot be used."""


class ResourceError(RefusedError):
    """No node that the cluster has, or could launch, fits one actor."""


class OutputError(RefusedError):
    """The output belongs to another recipe, or cannot hold this job's files."""


class FitError(RefusedError):
    """The vectors of a fit do not give what the fit asks of them."""


class FaultError(EmbedjobError):
    """The run ended with faults; everything else is committed."""


class LeaseHeldError(FaultError):
    """Another run holds the output."""


class InputChangedError(FaultError):
    """A shard is no longer the file that was planned."""


class ChunkError(FaultError):
    """One chunk cannot be embedded; the others can."""


class DeviceLostError(FaultError):
    """The device no longer answers in this process; another process may use it again."""


class InterruptedRunError(EmbedjobError):
    """A signal stopped the run; finished chunks are committed and another run resumes."""

    exit_code = 3
