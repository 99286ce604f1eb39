"""Templates as ordered segments: what a string with one text slot cannot say."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

CONTENTS = ("literal", "special", "text", "instruction", "demonstrations")


class Section(BaseModel):
    """One frozen, strict part of the config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Slot(Section):
    """How a slot is filled.

    `max_tokens` is of a text alone; `after` stands after what fills the slot, in its piece; `strip`
    takes the blanks off both ends of an instruction, and `after` away if nothing is left.
    """

    pool: bool = False
    tag: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    after: str = ""
    strip: bool = False


class Segment(Section):
    """One piece of a template; a literal or special carries `pool` and `tag` beside it."""

    literal: str | None = None
    special: str | None = None
    text: Slot | None = None
    instruction: Slot | None = None
    demonstrations: Slot | None = None
    pool: bool = False
    tag: str | None = None

    @model_validator(mode="after")
    def _is_one_piece(self) -> "Segment":
        named = [name for name in CONTENTS if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"a segment is one of {', '.join(CONTENTS)}; got {' and '.join(named) or 'none'}"
            )
        slot = self.slot
        if slot is not None and (self.pool or self.tag is not None):
            raise ValueError(f"write pool and tag inside, as {{{named[0]}: {{pool: true}}}}")
        if slot is not None and slot.max_tokens is not None and self.text is None:
            raise ValueError("max_tokens is of a text segment only; nothing else is ever cut")
        if slot is not None and slot.strip and self.instruction is None:
            raise ValueError("strip is of an instruction only; for texts there is prepare: strip")
        if self.text is not None and self.text.after:
            raise ValueError("after is not of a text segment; write a literal after it")
        return self

    @property
    def contents(self) -> str:
        """Which of the kinds of content the segment is."""
        return next(name for name in CONTENTS if getattr(self, name) is not None)

    @property
    def slot(self) -> Slot | None:
        """How the slot is filled; None for what is written out."""
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
