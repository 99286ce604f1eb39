"""Interventions: changes to the states inside a language model, one table entry for each kind.

`INTERVENTIONS` answers what other rooms ask of an intervention: its auxiliary template, its slot
in the templates, the blocks that it needs, and what it costs. Its hooks are in
`encoder/intervention_hooks.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from embedjob.config.types import Section, keyed_union


class Prepend(Section):
    """Token prepending (Fu et al. 2024): the state of the last token is shown to early tokens.

    Before each block in [start, exit), counted from 0, the state at the slot becomes that of the
    view's last token. `slot` is a token in every template, before the text; its embedding is that
    of the token `embedding`, or drawn from the normal distribution by `seed`, and no weights are
    changed. `normalized` follows from the tokenizer: true where the slot has other tokens around it
    if the normalizer sees it, as in the authors' code, than if it is a special token.
    """

    slot: str = Field(min_length=1)
    start: int = Field(ge=0)
    exit: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    embedding: str | None = Field(default=None, min_length=1)
    normalized: bool = False

    @model_validator(mode="after")
    def _has_blocks(self) -> "Prepend":
        if self.start >= self.exit:
            raise ValueError(f"start must be less than exit; got {self.start} and {self.exit}")
        if self.embedding is not None and self.seed:
            raise ValueError(
                f"seed draws an embedding, and embedding: {self.embedding!r} names one; leave one"
                " of the two out"
            )
        return self


class Contrast(Section):
    """Contrastive prompting (Cheng et al. 2025): subtract what an auxiliary prompt gives as well.

    In block `layer`, counted from 0, the last token's concatenated attention heads, v, become
    alpha (v - v_aux) when `scaled`, and v - v_aux at the norm of v under `norm`. v_aux is the same
    for the text under `template`, of which the blocks up to there are run.
    """

    template: str
    layer: int = Field(ge=0)
    mode: Literal["scaled", "norm"] = "scaled"
    alpha: float | None = None

    @model_validator(mode="after")
    def _has_its_alpha(self) -> "Contrast":
        if (self.mode == "scaled") != (self.alpha is not None):
            raise ValueError(
                "alpha belongs to mode: scaled, which needs it; got alpha:"
                f" {self.alpha} with mode: {self.mode}"
            )
        return self


class Prepending(Section):
    """Token prepending, under its key."""

    prepend: Prepend


class Contrasting(Section):
    """Contrastive prompting, under its key."""

    contrast: Contrast


# The highest block that a key may name: the last before a layer that is read, or of the model.
Limit = Literal["before what is read", "of the model"]


@dataclass(frozen=True)
class InterventionKind:
    """One kind of intervention, as all other rooms see it.

    Token views carry one slot and one auxiliary view: one kind may have a `slot`, and one a
    `template`.

    Args:
        section: its config value, whose one field has the key of the kind.
        blocks: its keys that count blocks, and the limit of each: a block that comes after all
            that is read would change nothing.
        needs_causal: whether it is pointless where every token attends to the last one.
        keeps_prefix: whether the tokens before its slot and before all spans keep their states, so
            that views may share them; if not, every view goes through the model whole.
        template: its key that is an auxiliary template, which gives one more view of each text.
        slot: its key that names a token, which every template has before the text.
        normalized: its key that says whether the tokenizer's normalizer sees the slot.
        stand_in: its key that names the token whose embedding the slot has.
        extra_blocks: the blocks that a text goes through beside its views.
    """

    section: type[Section]
    blocks: Mapping[str, Limit] = field(default_factory=dict)
    needs_causal: bool = True
    keeps_prefix: bool = False
    template: str | None = None
    slot: str | None = None
    normalized: str | None = None
    stand_in: str | None = None
    extra_blocks: Callable[[Any], int] = lambda given: 0


INTERVENTIONS: Mapping[str, InterventionKind] = {
    "prepend": InterventionKind(
        Prepending,
        blocks={"exit": "of the model", "start": "before what is read"},
        keeps_prefix=True,
        slot="slot",
        normalized="normalized",
        stand_in="embedding",
    ),
    "contrast": InterventionKind(
        Contrasting,
        blocks={"layer": "before what is read"},
        keeps_prefix=True,
        template="template",
        extra_blocks=lambda contrast: int(contrast.layer) + 1,
    ),
}
_BY_SECTION = {kind.section: (key, kind) for key, kind in INTERVENTIONS.items()}
if TYPE_CHECKING:
    Intervention = Section
else:
    Intervention = keyed_union(
        {key: kind.section for key, kind in INTERVENTIONS.items()}, name="intervention"
    )


@dataclass(frozen=True)
class Given:
    """One intervention of a recipe: its key, its kind, its section and the settings in it."""

    key: str
    kind: InterventionKind
    section: Section
    settings: Any

    def value(self, field: str | None) -> Any:
        """Return the setting in this field; None where the kind has no such field."""
        return None if field is None else getattr(self.settings, field)

    @property
    def template(self) -> str | None:
        """The auxiliary template."""
        found: str | None = self.value(self.kind.template)
        return found

    @property
    def slot(self) -> str | None:
        """The token that marks the slot in every template."""
        found: str | None = self.value(self.kind.slot)
        return found

    @property
    def normalized(self) -> bool:
        """Whether the normalizer sees the slot."""
        return bool(self.value(self.kind.normalized))

    def seen(self, normalized: bool) -> Section:
        """Return the section with another answer to whether the normalizer sees the slot."""
        settings = self.settings.model_copy(update={str(self.kind.normalized): normalized})
        return self.section.model_copy(update={self.key: settings})


def given(interventions: Sequence[Section]) -> Iterator[Given]:
    """Yield a recipe's interventions with their kinds."""
    for section in interventions:
        key, kind = _BY_SECTION[type(section)]
        yield Given(key, kind, section, getattr(section, key))


def slotted(interventions: Sequence[Section]) -> Given | None:
    """Return the intervention that has a slot in every template, if there is one."""
    return next((one for one in given(interventions) if one.slot is not None), None)


def keep_prefixes(interventions: Sequence[Section]) -> bool:
    """Tell whether views may share the tokens that they begin with under these interventions."""
    return all(one.kind.keeps_prefix for one in given(interventions))


def auxiliary_templates(interventions: Sequence[Section]) -> dict[str, str]:
    """Return the auxiliary templates of interventions, by the path of the key that holds each."""
    return {
        f"encoder.interventions: {one.key}.{one.kind.template}": one.template
        for one in given(interventions)
        if one.template is not None
    }
