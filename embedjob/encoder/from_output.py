"""The recipes that wrote an output, so that queries are embedded by exactly them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe, Role
from embedjob.errors import ModelError, OutputError
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests
from embedjob.output.calibration import Calibration
from embedjob.output.claim import Claim, read_claims
from embedjob.output.fingerprint import fingerprint
from embedjob.output.snapshot import newest


@dataclass(frozen=True)
class Recorded:
    """The recipe that wrote an output's documents, and those of its method for every role.

    With it come the ranges by which the vectors were quantised, where they were.
    """

    recipe: Recipe
    recipes: Mapping[Role, Recipe]
    calibration: Calibration | None = None


def recorded(
    out: str,
    *,
    model: str | None = None,
    base: str | None = None,
    adapters: Sequence[str] | None = None,
) -> Recorded:
    """The recipes behind an output's newest snapshot, or its first claim while there is none.

    OutputError if it has none, ModelError if the model is no longer the one that wrote; `model`,
    `base` and `adapters` say where copies of those lie.
    """
    claim = _claim(out)
    moved: dict[str, Any] = {"model": model, "revision": None} if model else {}
    moved |= {} if base is None else {"base": base}
    moved |= {} if adapters is None else {"adapters": list(adapters)}
    kept = [recipe_from({**values, **moved}, {}) for values in claim.recipes.values()]
    wrote = [one for one in kept if fingerprint(one, claim.digests) == claim.fingerprint]
    if not wrote:
        raise OutputError(f"{out}: none of its recipes gives its fingerprint; was it edited?")
    _require_same_model(wrote[0], claim, out)
    return Recorded(wrote[0], {recipe.role: recipe for recipe in kept}, claim.calibration)


def _claim(out: str) -> Claim:
    claims = read_claims(out)
    if not claims:
        raise OutputError(f"{out}: there is no _embedjob.json; give the output of a run")
    snapshot = newest(out)
    if snapshot is None:
        return claims[0]
    claim = next((one for one in claims if one.fingerprint == snapshot.fingerprint), None)
    if claim is None:
        raise OutputError(
            f"{out}: its newest snapshot has the fingerprint {snapshot.fingerprint}, but there are"
            f" claims only for {', '.join(claim.fingerprint[:12] for claim in claims)}; was a file"
            " in claims/ deleted? Restore it from a copy of the output"
        )
    return claim


def _require_same_model(recipe: Recipe, claim: Claim, out: str) -> None:
    found, then = model_digests(components_of(recipe)), dict(claim.digests)
    differ = sorted(name for name in {*found, *then} if found.get(name) != then.get(name))
    if differ:
        raise ModelError(
            f"{recipe.model} is not the model that wrote {out}: {', '.join(differ)} differ; give"
            " the path of a copy of that model as `model`"
        )
