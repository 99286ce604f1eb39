"""Templates as written: a string with one text slot, or ordered segments."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from embedjob.config.types import NotEmpty, Section

CONTENTS = ("literal", "special", "text", "instruction", "demonstrations")


class Slot(Section):
    """How a slot is filled.

    `max_tokens` limits a text. `after` is written after the content of the slot, in the same
    segment. `strip` takes the blanks off both ends of an instruction, and drops `after` if nothing
    is left.
    """

    pool: bool = False
    tag: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    after: str = ""
    strip: bool = False


class Segment(Section):
    """One segment of a template; a literal or special carries `pool` and `tag` beside it."""

    literal: str | None = None
    special: str | None = None
    text: Slot | None = None
    instruction: Slot | None = None
    demonstrations: Slot | None = None
    pool: bool = False
    tag: str | None = None

    @model_validator(mode="after")
    def _has_one_content(self) -> "Segment":
        named = [name for name in CONTENTS if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"a segment has exactly one of {', '.join(CONTENTS)}; got"
                f" {' and '.join(named) or 'none'}"
            )
        slot = self.slot
        if slot is not None and (self.pool or self.tag is not None):
            raise ValueError(f"write pool and tag inside, as {{{named[0]}: {{pool: true}}}}")
        if slot is not None and slot.max_tokens is not None and self.text is None:
            raise ValueError("max_tokens applies to text segments only")
        if slot is not None and slot.strip and self.instruction is None:
            raise ValueError(
                "strip applies to instructions only; for texts there is prepare: strip"
            )
        if self.text is not None and self.text.after:
            raise ValueError("after does not apply to a text segment; write a literal after it")
        return self

    @property
    def contents(self) -> str:
        """The kind of content that the segment has."""
        return next(name for name in CONTENTS if getattr(self, name) is not None)

    @property
    def slot(self) -> Slot | None:
        """How the slot is filled; None for a literal or special."""
        return self.text or self.instruction or self.demonstrations

    @property
    def pooled(self) -> bool:
        """Whether the segment counts under `span: pooled`."""
        return self.pool if self.slot is None else self.slot.pool

    @property
    def name(self) -> str | None:
        """The segment's tag."""
        return self.tag if self.slot is None else self.slot.tag


class Demonstration(Section):
    """One few-shot example; its own instruction, or else the recipe's."""

    text: str
    answer: str
    instruction: str | None = None


class WeightedTemplate(Section):
    """A template, its weight under `aggregation: weighted`, and how its segments are joined.

    Joint segments are tokenized as one string; separate segments each alone, their ids joined.
    """

    template: str | tuple[Segment, ...]
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    join: Literal["joint", "separate"] = "joint"

    @model_validator(mode="after")
    def _has_what_it_joins(self) -> "WeightedTemplate":
        if self.join == "separate" and isinstance(self.template, str):
            raise ValueError("join: separate needs a list of segments; got a string")
        return self


Template = str | WeightedTemplate | tuple[Segment, ...]
Templates = Annotated[tuple[Template, ...], NotEmpty]


def holds_one_text(template: Template) -> bool:
    """Return whether a template is tokenized as one string that holds the text once."""
    if isinstance(template, WeightedTemplate):
        return template.join == "joint" and holds_one_text(template.template)
    return isinstance(template, str) or sum(one.text is not None for one in template) == 1
