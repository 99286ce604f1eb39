"""Templates with their slots filled: segments in order, and where the text goes."""

import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from embedjob.config.heads import Continuation
from embedjob.config.interventions import auxiliary_templates
from embedjob.config.job_file import JobSource
from embedjob.config.pooling import SpanOffset, SpanTag
from embedjob.config.recipe import Recipe
from embedjob.config.segments import Demonstration, Segment, Slot, WeightedTemplate
from embedjob.errors import ConfigError

BRACES = "a literal brace is written '{{' or '}}'"


def literals_and_slots(template: str, *, key: str) -> list[tuple[str, str | None]]:
    """Split a template into literals, each with the slot after it; None at the end or at a brace.

    Raises:
        ConfigError: the template cannot be read; the message names `key`.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r} cannot be read ({error}); {BRACES}") from error
    pieces: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        dressed = f"!{conversion}" if conversion else f":{spec}" if spec else ""
        pieces.append((literal, None if name is None else name + dressed))
    return pieces


def slots(template: str, *, key: str) -> set[str]:
    """Return the names of the slots in a template."""
    return {slot for _, slot in literals_and_slots(template, key=key) if slot is not None}


def filled(
    template: str, values: Mapping[str, Callable[[], str]], *, key: str
) -> list[tuple[str, str | None]]:
    """Fill slots by name; return the literals, each with the slot after it that has no value."""
    pieces: list[tuple[str, str | None]] = []
    literal = ""
    for before, slot in literals_and_slots(template, key=key):
        literal += before
        if slot is None:
            continue
        if slot not in values:
            pieces.append((literal, slot))
            literal = ""
        else:
            literal += values[slot]()
    return [*pieces, (literal, None)]


PATTERN = "encoder.demonstration"
_SLOTS = ("text", "answer", "instruction")


def instruction(given: str | None) -> str:
    """Return the instruction that a slot asks for; ConfigError if none is set."""
    if given is None:
        raise ConfigError(
            "encoder.templates: a template has an {instruction} slot, but encoder.instruction is"
            " not set; set it ('' is allowed)"
        )
    return given


def demonstrations(recipe: Recipe) -> str:
    """Return the few-shot examples one after another, as written or under the pattern."""
    if recipe.demonstration is not None:
        _require_pattern(recipe.demonstration)
    return "".join(
        one if isinstance(one, str) else _demonstration(one, recipe)
        for one in recipe.demonstrations
    )


def _require_pattern(pattern: str) -> None:
    """Raise ConfigError unless the pattern shows text and answer, and has no unknown slot."""
    names = slots(pattern, key=PATTERN)
    if unknown := sorted(names.difference(_SLOTS)):
        raise ConfigError(
            f"{PATTERN}: {pattern!r} has an unknown slot {{{unknown[0]}}};"
            f" allowed are {{text}}, {{answer}} and {{instruction}} ({BRACES})"
        )
    if missing := [slot for slot in ("text", "answer") if slot not in names]:
        raise ConfigError(
            f"{PATTERN}: {pattern!r} has no {{{missing[0]}}}, which would be left out of"
            " every demonstration; add it, or give demonstrations as strings"
        )


def _demonstration(one: Demonstration, recipe: Recipe) -> str:
    if recipe.demonstration is None:
        raise ConfigError(
            "encoder.demonstration: is not set, and a demonstration of text and answer needs it;"
            " set it, with the slots {text} and {answer}, or give demonstrations as strings"
        )
    own = recipe.instruction if one.instruction is None else one.instruction
    values: dict[str, Callable[[], str]] = {
        "text": lambda: one.text,
        "answer": lambda: one.answer,
        "instruction": partial(instruction, own),
    }
    return filled(recipe.demonstration, values, key=PATTERN)[0][0]


# The cleanings that take the blanks off both ends of a whole prompt.
STRIPPING = ("eol", "moee")

_TEMPLATES = "encoder.templates"


@dataclass(frozen=True)
class FilledSegment:
    """A segment after its slot is filled; `content` is None for the text, `marked` is the span."""

    content: str | None
    marked: bool = False
    special: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True)
class FilledTemplate:
    """The segments of a view, whether they are tokenized as one string, and the view's weight."""

    segments: tuple[FilledSegment, ...]
    as_one_string: bool = True
    weight: float = 1.0


def templates(recipe: Recipe) -> tuple[FilledTemplate, ...]:
    """Return the recipe's templates, filled; ConfigError if they do not fit its other keys."""
    filled_templates = tuple(
        continued
        for one in recipe.templates
        for continued in _continued(_template(one, recipe), recipe.continuations)
    )
    if len({one.as_one_string for one in filled_templates}) > 1:
        raise ConfigError(
            "encoder.templates: got join: joint in some templates and join: separate in others; set"
            " the same join in all"
        )
    if not filled_templates[0].as_one_string and recipe.prepare in STRIPPING:
        raise ConfigError(
            f"encoder.prepare: got {recipe.prepare}, which strips the whole prompt; with join:"
            " separate there is none, allowed is another cleaning or join: joint"
        )
    for key, template in auxiliary_templates(recipe.interventions).items():
        _of_string(template, recipe, key=key)
    return filled_templates


def slots_read(recipe: Recipe) -> frozenset[str]:
    """Return the names of the slots in the recipe's templates and in its demonstrations."""
    names: set[str] = set()
    for one in recipe.templates:
        written = one.template if isinstance(one, WeightedTemplate) else one
        if isinstance(written, str):
            names |= slots(written, key=_TEMPLATES)
        else:
            names |= {segment.contents for segment in written}
    for key, template in auxiliary_templates(recipe.interventions).items():
        names |= slots(template, key=key)
    if "demonstrations" in names and recipe.demonstration is not None:
        names |= slots(recipe.demonstration, key=PATTERN)
    return frozenset(names)


# Keys of `encoder` that fill a slot, and the slot that each fills.
_FILLING = {
    "instruction": "instruction",
    "demonstrations": "demonstrations",
    "demonstration": "demonstrations",
    "demonstrations_count": "demonstrations",
}


def check_slots(source: JobSource, recipes: Collection[Recipe]) -> None:
    """Raise ConfigError if the job fills a slot that no template of its recipes has."""
    read = frozenset[str]().union(*map(slots_read, recipes))
    for key, slot in _FILLING.items():
        written = source.get(f"encoder.{key}")
        if (written or written is False) and slot not in read:
            raise ConfigError(
                f"encoder.{key}: is set, but no template of any role has a slot for it, so it would"
                f" change nothing; write {{{slot}}} into encoder.templates, or remove the key"
            )


def span_rule(recipe: Recipe) -> tuple[str, int]:
    """Return the name of the span rule and its offset; a tag marks segments as `pool` does."""
    span = recipe.span
    if recipe.continuations:
        return "continuation", 0
    if isinstance(span, SpanTag):
        return "pooled", span.offset
    return (span.rule, span.offset) if isinstance(span, SpanOffset) else (span, 0)


def tokenized_alone(recipe: Recipe) -> tuple[FilledTemplate, ...]:
    """Return per template the segments that are also tokenized alone; empty without `span.alone`.

    Raises:
        ConfigError: they lack the text, or are not the last segments of a joint template.
    """
    if not (isinstance(recipe.span, SpanOffset) and recipe.span.alone):
        return ()
    alone = []
    for one in templates(recipe):
        marked = tuple(segment for segment in one.segments if segment.marked)
        ends = one.segments[len(one.segments) - len(marked) :] == marked
        held = any(segment.content is None for segment in marked)
        if recipe.span.rule != "pooled" or not (one.as_one_string and ends and held):
            raise ConfigError(
                "encoder.span: alone counts the last segments of a joint template, the text among"
                " them; set rule: pooled, and pool: true on the text and on all that follows it"
            )
        alone.append(FilledTemplate(marked, weight=one.weight))
    return tuple(alone)


def _template(template: object, recipe: Recipe) -> FilledTemplate:
    if isinstance(template, WeightedTemplate):
        as_one_string = template.join == "joint"
        return FilledTemplate(
            _segments(template.template, recipe, as_one_string), as_one_string, template.weight
        )
    if isinstance(template, str | tuple):
        return FilledTemplate(_segments(template, recipe, True))
    raise ConfigError(f"encoder.templates: got {template!r}; allowed is a string or segments")


def _continued(
    template: FilledTemplate, continuations: Sequence[Continuation]
) -> tuple[FilledTemplate, ...]:
    """Return the template before each continuation, or by itself where there are none.

    Ids are no part of a template: they follow the ids of its views.
    """
    each = tuple(
        replace(template, segments=(*template.segments, FilledSegment(one, marked=True)))
        if isinstance(one, str)
        else template
        for one in continuations
    )
    return each or (template,)


def _segments(
    template: str | tuple[Segment, ...], recipe: Recipe, as_one_string: bool
) -> tuple[FilledSegment, ...]:
    if isinstance(template, str):
        segments = _of_string(template, recipe, key=_TEMPLATES)
    else:
        segments = tuple(_of_segment(segment, recipe) for segment in template)
        if not any(segment.content is None for segment in segments):
            raise ConfigError("encoder.templates: a list of segments has no {text: {}}; add one")
        if as_one_string and any(segment.max_tokens for segment in segments):
            raise ConfigError(
                "encoder.templates: max_tokens of one segment is available with join: separate"
                " only; encoder.max_tokens limits the whole view"
            )
    _require_span(segments, recipe)
    if not isinstance(template, str):
        _require_marks_are_read(template, recipe)
    return segments


def _of_string(template: str, recipe: Recipe, *, key: str) -> tuple[FilledSegment, ...]:
    parts = filled(template, _values(recipe), key=key)
    for _, slot in parts:
        if slot not in ("text", None):
            raise ConfigError(
                f"{key}: {template!r} has an unknown slot {{{slot}}};"
                f" allowed are {{text}}, {{instruction}} and {{demonstrations}} ({BRACES})"
            )
    if len(parts) != 2:
        raise ConfigError(
            f"{key}: {template!r} has {len(parts) - 1} {{text}} slots; exactly one is allowed in a"
            f" string, several in a list of segments ({BRACES})"
        )
    return (FilledSegment(parts[0][0]), FilledSegment(None), FilledSegment(parts[1][0]))


def _of_segment(segment: Segment, recipe: Recipe) -> FilledSegment:
    tag = recipe.span.tag if isinstance(recipe.span, SpanTag) else None
    marked = segment.pooled if tag is None else segment.name == tag
    if segment.text is not None:
        return FilledSegment(None, marked, max_tokens=segment.text.max_tokens)
    if segment.special is not None:
        return FilledSegment(segment.special, marked, special=True)
    if segment.literal is not None:
        return FilledSegment(segment.literal, marked)
    slot = "instruction" if segment.instruction is not None else "demonstrations"
    written = _values(recipe)[slot]()
    how = segment.slot or Slot()
    kept = written.strip() if how.strip else written
    # Without an instruction LLM2Vec (strip) writes no blank; Echo (no strip) writes its comma.
    after = "" if how.strip and not kept else how.after
    return FilledSegment(kept + after, marked)


def _values(recipe: Recipe) -> dict[str, Callable[[], str]]:
    return {
        "instruction": partial(instruction, recipe.instruction),
        "demonstrations": partial(demonstrations, recipe),
    }


def _require_marks_are_read(template: Sequence[Segment], recipe: Recipe) -> None:
    """Refuse marks that the span does not read, as one of the two must be a mistake."""
    span = recipe.span
    rule = span.rule if isinstance(span, SpanOffset) else span
    got = f"tag: {span.tag}" if isinstance(span, SpanTag) else rule
    if (got == "all" or isinstance(span, SpanTag)) and any(one.pooled for one in template):
        raise ConfigError(
            f"encoder.span: got {got!r}, but a segment has pool: true, which only span: pooled"
            " reads; set span: pooled, or leave pool out"
        )


def _require_span(segments: Sequence[FilledSegment], recipe: Recipe) -> None:
    if span_rule(recipe)[0] != "pooled":
        return
    marked = [number for number, segment in enumerate(segments) if segment.marked]
    wanted = f"tag: {recipe.span.tag}" if isinstance(recipe.span, SpanTag) else "pool: true"
    if not marked:
        raise ConfigError(
            f"encoder.span: no segment of a template has {wanted}; give it to the segments whose"
            " tokens count, or choose another span"
        )
    if marked[-1] - marked[0] + 1 != len(marked):
        raise ConfigError(
            f"encoder.span: the segments with {wanted} are not neighbours; a span is one run of"
            " tokens, so give it to the segments between them too, or to fewer"
        )
