"""Recorded recipes: what the claim of an output says of the encoder that wrote it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe, Role
from embedjob.errors import ModelError, OutputError
from embedjob.job.resolve_generation import moved_generator
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests
from embedjob.models.tables.word_tables import is_vocabulary
from embedjob.output.calibration import Calibration
from embedjob.output.claim import Claim, changed_since, read_claims
from embedjob.output.fingerprint import fingerprint
from embedjob.output.fits.artefacts import ARTEFACTS_FOLDER, read_artefact, read_fitted, read_head
from embedjob.output.fits.records import read_records
from embedjob.output.snapshot import newest_snapshot
from embedjob.storage.objects import absolute, join
from embedjob.vectors.fits.fitted import Fitted


@dataclass(frozen=True)
class RecordedRecipes:
    """The recipe that wrote an output's documents, and its method's recipes for every role.

    `calibration` has the ranges by which the vectors were quantised, None where they were not;
    `fitted` is what the fits of finishing steps left, by the sha256 that a step names.
    """

    recipe: Recipe
    recipes: Mapping[Role, Recipe]
    calibration: Calibration | None
    fitted: Mapping[str, Fitted]


def recorded_recipes(
    out: str,
    *,
    copies: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> RecordedRecipes:
    """Return the recipes behind an output's newest snapshot, or behind its first claim without one.

    Args:
        out: the output.
        copies: where copies of models lie that are not where the job had them: `model`, `base` and
            `adapters` of the encoder, and the `generator`.
        trust_remote_code: whether the model's own Python code may run, if the job let it run.
        allow_pickle: whether pickled weights may be read, if the job let them be read.

    Raises:
        OutputError: the output has no recipe, or an artefact of its fits is damaged.
        ModelError: the model is no longer the one that wrote, or needs what is not allowed here.
    """
    claim = _newest_claim(out)
    copied = {key: place for key, place in (copies or {}).items() if place is not None}
    # A vocabulary lies in the output, wherever that lies today.
    named = str(claim.recipes["document"].get("model")).rpartition("/")[2]
    if is_vocabulary(named) and "model" not in copied:
        copied["model"] = join(out, ARTEFACTS_FOLDER, named)
    moved: dict[str, Any] = {"revision": None} if "model" in copied else {}
    moved |= {key: copied[key] for key in ("model", "base", "adapters") if key in copied}
    kept = [
        recipe_from({**values, **moved, **moved_generator(values, copied)}, {})
        for values in claim.recipes.values()
    ]
    # A dtype of auto is a job's word: no run has left it so.
    resolved = [recipe for recipe in kept if recipe.dtype != "auto"]
    wrote = [one for one in resolved if fingerprint(one, claim.digests) == claim.fingerprint]
    if not wrote:
        now: dict[str, Any] = {one.role: one.model_dump(mode="json") for one in kept}
        why = changed_since(claim, now, claim.digests).rstrip() or "was it edited?"
        raise OutputError(f"{out}: none of its recipes gives its fingerprint; {why}")
    _require_allowed(kept, out, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    _require_same_model(wrote[0], claim, out)
    by_role = {recipe.role: recipe for recipe in kept}
    fitted = read_fitted(out, kept)
    return RecordedRecipes(wrote[0], by_role, claim.calibration, fitted)


def recorded_alignment(out: str, to: str) -> Fitted:
    """Return the rotation from the space of an output to another's, as a fit of its job made it.

    OutputError where no fit has made one for the recipe that the output serves.
    """
    claim = _newest_claim(out)
    recipe = recipe_from(claim.recipes["document"], {})
    in_float32 = recipe.model_copy(update={"vector_dtype": "float32"})
    vectors = fingerprint(in_float32, claim.digests)
    for record in sorted(read_records(out).values(), key=lambda one: one.number, reverse=True):
        if record.kind == "align":
            head = read_head(out, record.kind, record.artefact)
            if head.encoder == vectors and absolute(head.parameters["source"]) == absolute(to):
                return read_artefact(out, record.kind, record.artefact)
    raise OutputError(
        f"{out}: no fit has made a rotation to the space of {to}; run its job with"
        f" fit: [{{kind: align, name: a, from: {to}}}], or `embedjob fit`"
    )


def _newest_claim(out: str) -> Claim:
    claims = read_claims(out)
    if not claims:
        raise OutputError(f"{out}: there is no _embedjob.json; give the output of a run")
    snapshot = newest_snapshot(out)
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


def _require_allowed(recipes: Iterable[Recipe], out: str, **allowed: bool) -> None:
    """Refuse what only the output asks for: whoever wrote it could run code in this process."""
    for recipe in recipes:
        for key, may in allowed.items():
            if getattr(recipe, key) and not may:
                raise ModelError(
                    f"{out}: its recipe has {key}: true, which may run code that comes with"
                    f" {recipe.model}; pass {key}=True to Encoder.from_output if you trust that"
                    " model, or open another output"
                )


def _require_same_model(recipe: Recipe, claim: Claim, out: str) -> None:
    now, then = model_digests(components_of(recipe)), dict(claim.digests)
    differ = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    if differ:
        why = changed_since(claim, {recipe.role: claim.recipes[recipe.role]}, now)
        raise ModelError(
            f"{recipe.model} is not the model that wrote {out}: {', '.join(differ)} differ; give"
            " the path of a copy of that model as `model`" + (why and f"\n{why.rstrip()}")
        )
