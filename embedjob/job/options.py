"""How one run is started, and where it speaks: what the job file does not say."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from embedjob.job.planning import JobPlan
from embedjob.job.result import Tally

Say = Callable[[str], None]
Shown = Callable[[JobPlan], AbstractContextManager[Callable[[Tally], None]]]


@dataclass(frozen=True)
class Options:
    """The options of `run`: `address` is a Ray cluster, None where a local Ray is started."""

    address: str | None = None
    takeover: bool = False
    new_fingerprint: bool = False
    publish_partial: bool = False
    repair: bool = False
    retry_quarantined: bool = False
    new_input: bool = False
    allow_shrink: bool = False
    refit: bool = False

    @property
    def redoes(self) -> bool:
        """Whether committed chunks, or artefacts of fits, may be made again."""
        return self.repair or self.retry_quarantined or self.refit


@dataclass(frozen=True)
class Console:
    """How a run speaks: a line now and then, and the progress while it embeds."""

    say: Say
    shown: Shown
