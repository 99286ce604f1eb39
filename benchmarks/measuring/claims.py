"""What a program claims: ratios beside the floors that they must reach, and whether they do."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SAME = 0.9999


@dataclass(frozen=True)
class Claim:
    """A ratio that must be at least `floor`, or at most `ceiling`, between equal results.

    `spread` is the ratio of each round, `cosine` the smallest between the results of both sides.
    """

    name: str
    ratio: float
    spread: Sequence[float] = ()
    floor: float | None = None
    ceiling: float | None = None
    cosine: float | None = None
    least_cosine: float = SAME

    @property
    def holds(self) -> bool:
        """Whether the ratio is on the right side of its bound and the results are the same."""
        reaches = self.floor is None or self.ratio >= self.floor
        stays = self.ceiling is None or self.ratio <= self.ceiling
        return reaches and stays and (self.cosine is None or self.cosine >= self.least_cosine)

    def unbound(self) -> "Claim":
        """The same without its bound: a tiny run on a CPU says nothing about speed."""
        return replace(self, floor=None, ceiling=None)

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.floor is not None:
            return f">= {self.floor:g}"
        return "reported" if self.ceiling is None else f"<= {self.ceiling:g}"


def report(
    claims: Sequence[Claim],
    figures: Mapping[str, Any],
    *,
    asked: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> None:
    """Prints every figure and claim, and all of it as JSON on the last line."""
    for name, value in {**machine, **figures}.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else value
        print(f"{name:60} {shown}")
    for claim in claims:
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        print(f"{claim.name:60} {claim.ratio:.7g} ({claim.bound}) {verdict}")
        if claim.spread:
            print(f"{'':60} rounds {', '.join(f'{one:.3f}' for one in claim.spread)}")
        if claim.cosine is not None:
            print(f"{'':60} smallest cosine {claim.cosine:.7f}")
    shown = {
        "program": Path(sys.argv[0]).stem,
        "asked": dict(asked),
        "machine": dict(machine),
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in claims],
        "figures": dict(figures),
    }
    print(json.dumps(shown, default=str), flush=True)
