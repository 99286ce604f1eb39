"""Interventions: what is done to the states inside a language model while a view goes through."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from embedjob.config.segments import Section


class Prepend(Section):
    """Token prepending (Fu et al. 2024): an early token is shown what the last one has seen.

    Before each block in [start, exit), counted from 0, the state at the slot becomes that of the
    view's last token. `slot` is a special token in every template, before the text; its embedding
    is that of the token `embedding`, or drawn from the normal distribution by `seed`, and no
    weights are changed.
    """

    slot: str = Field(min_length=1)
    start: int = Field(ge=0)
    exit: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    embedding: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _has_blocks(self) -> "Prepend":
        if self.start >= self.exit:
            raise ValueError(f"start must be less than exit; got {self.start} and {self.exit}")
        if self.embedding is not None and self.seed:
            raise ValueError(
                f"seed draws an embedding, and this is that of {self.embedding!r}; leave one out"
            )
        return self


class Contrast(Section):
    """Contrastive prompting (Cheng et al. 2025): less what an auxiliary prompt gives as well.

    In block `layer`, counted from 0, what the last token's heads bring together, v, becomes
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
                f"alpha is of mode: scaled, which needs it; got alpha {self.alpha} with {self.mode}"
            )
        return self


class Prepending(Section):
    """The intervention of that name."""

    prepend: Prepend


class Contrasting(Section):
    """The intervention of that name."""

    contrast: Contrast


_KINDS = ("prepend", "contrast")


def _kind(written: Any) -> str | None:
    keys = written if isinstance(written, dict) else getattr(type(written), "model_fields", ())
    return next((kind for kind in _KINDS if kind in keys), None)


# By its key, or a mistake in one kind would be told as a mistake in every kind.
Intervention = Annotated[
    Annotated[Prepending, Tag("prepend")] | Annotated[Contrasting, Tag("contrast")],
    Discriminator(
        _kind,
        custom_error_type="intervention",
        custom_error_message="an object with one of the keys " + ", ".join(_KINDS),
    ),
]


def check_interventions(
    given: Sequence[Prepending | Contrasting], *, causal: bool, long_text: str, decodes: bool
) -> None:
    """ValueError where a recipe has them twice, or else is not one that can be intervened in."""
    if len({type(one) for one in given}) < len(given):
        raise ValueError("interventions: one of each kind is allowed, prepend and contrast")
    if given and not causal:
        raise ValueError(
            "interventions are of causal attention; under bidirectional attention every token"
            " sees the last one already"
        )
    if given and (long_text not in ("truncate", "bad") or decodes):
        raise ValueError(
            f"interventions: got long_text: {long_text}{' and decode' if decodes else ''}; allowed"
            " is truncate or bad, without decode"
        )
