"""Templates as pieces in order, their slots filled: what is written, and where the text goes."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from embedjob.errors import ConfigError
from embedjob.readout import SpanOffset, SpanTag
from embedjob.recipe import Recipe, WeightedTemplate
from embedjob.segments import Demonstration, Segment

_BRACES = "a literal brace is written '{{' or '}}'"


@dataclass(frozen=True)
class Piece:
    """One segment: its content, None where the text goes; `marked` ones are the recipe's span."""

    content: str | None
    marked: bool = False
    special: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True)
class Template:
    """One view's pieces, whether they are tokenized as one string, and the view's weight."""

    pieces: tuple[Piece, ...]
    joint: bool = True
    weight: float = 1.0


def templates(recipe: Recipe) -> tuple[Template, ...]:
    """The recipe's templates in order; ConfigError if they do not go with the rest of it."""
    found = tuple(_template(one, recipe) for one in recipe.templates)
    if len({one.joint for one in found}) > 1:
        raise ConfigError(
            "encoder.templates: got some that join: joint and some that join: separate; all views"
            " of a recipe are joined alike"
        )
    if not found[0].joint and recipe.prepare == "eol":
        raise ConfigError(
            "encoder.prepare: got eol, which strips the whole prompt; with join: separate there is"
            " none, allowed is another cleaning or join: joint"
        )
    return found


def span_rule(recipe: Recipe) -> tuple[str, int]:
    """The name of the recipe's span rule, and its offset; a tag's segments are pooled ones."""
    span = recipe.span
    if isinstance(span, SpanTag):
        return "pooled", span.offset
    return (span.rule, span.offset) if isinstance(span, SpanOffset) else (span, 0)


def alone(recipe: Recipe) -> tuple[Template, ...]:
    """Per template, the segments that are tokenized by themselves too; none if the span is not so.

    ConfigError unless they hold the text and are the last ones of a joint template.
    """
    if not (isinstance(recipe.span, SpanOffset) and recipe.span.alone):
        return ()
    found = []
    for one in templates(recipe):
        marked = tuple(piece for piece in one.pieces if piece.marked)
        ends = one.pieces[len(one.pieces) - len(marked) :] == marked
        held = any(piece.content is None for piece in marked)
        if recipe.span.rule != "pooled" or not (one.joint and ends and held):
            raise ConfigError(
                "encoder.span: alone counts the last segments of a joint template, the text among"
                " them; set rule: pooled, and pool: true on the text and on all that follows it"
            )
        found.append(Template(marked, weight=one.weight))
    return tuple(found)


def filled(template: str, values: Mapping[str, Callable[[], str]]) -> list[tuple[str, str | None]]:
    """Each run of characters with the slot after it that no value fills, None at the end."""
    runs: list[tuple[str, str | None]] = []
    literal = ""
    for before, slot in _slots(template):
        literal += before
        if slot is None:
            continue
        if slot not in values:
            runs.append((literal, slot))
            literal = ""
        else:
            literal += values[slot]()
    return [*runs, (literal, None)]


def _template(template: object, recipe: Recipe) -> Template:
    if isinstance(template, WeightedTemplate):
        joint = template.join == "joint"
        return Template(_pieces(template.template, recipe, joint), joint, template.weight)
    if isinstance(template, str | tuple):
        return Template(_pieces(template, recipe, True))
    raise ConfigError(f"encoder.templates: got {template!r}; allowed is a string or segments")


def _pieces(template: str | tuple[Segment, ...], recipe: Recipe, joint: bool) -> tuple[Piece, ...]:
    if isinstance(template, str):
        pieces = _of_string(template, recipe)
    else:
        pieces = tuple(_of_segment(segment, recipe) for segment in template)
        if not any(piece.content is None for piece in pieces):
            raise ConfigError("encoder.templates: a list of segments has no {text: {}}; add one")
        if joint and any(piece.max_tokens for piece in pieces):
            raise ConfigError(
                "encoder.templates: max_tokens of one segment is available with join: separate"
                " only; encoder.max_tokens limits the whole view"
            )
        _require_marks_are_read(template, recipe)
    _require_span(pieces, recipe)
    return pieces


def _of_string(template: str, recipe: Recipe) -> tuple[Piece, ...]:
    runs = filled(template, _values(recipe))
    for _, slot in runs:
        if slot not in ("text", None):
            raise ConfigError(
                f"encoder.templates: {template!r} has an unknown slot {{{slot}}};"
                f" allowed are {{text}}, {{instruction}} and {{demonstrations}} ({_BRACES})"
            )
    if len(runs) != 2:
        raise ConfigError(
            f"encoder.templates: {template!r} has {len(runs) - 1} {{text}} slots; exactly one is"
            " allowed in a string, several in a list of segments"
            " (write a literal brace as '{{' or '}}')"
        )
    return (Piece(runs[0][0]), Piece(None), Piece(runs[1][0]))


def _of_segment(segment: Segment, recipe: Recipe) -> Piece:
    tag = recipe.span.tag if isinstance(recipe.span, SpanTag) else None
    marked = segment.pooled if tag is None else segment.name == tag
    if segment.text is not None:
        return Piece(None, marked, max_tokens=segment.text.max_tokens)
    if segment.special is not None:
        return Piece(segment.special, marked, special=True)
    if segment.literal is not None:
        return Piece(segment.literal, marked)
    slot = "instruction" if segment.instruction is not None else "demonstrations"
    written = _values(recipe)[slot]()
    if segment.slot and segment.slot.strip:
        written = written.strip()
    return Piece(written + (segment.slot.after if segment.slot else ""), marked)


def _values(recipe: Recipe) -> dict[str, Callable[[], str]]:
    return {
        "instruction": partial(_instruction, recipe.instruction),
        "demonstrations": partial(_demonstrations, recipe),
    }


def _instruction(instruction: str | None) -> str:
    if instruction is None:
        raise ConfigError(
            "encoder.templates: one has an {instruction} slot, but encoder.instruction is not set;"
            " set it ('' is allowed)"
        )
    return instruction


def _demonstrations(recipe: Recipe) -> str:
    """The few-shot examples one after another, as written or under the method's pattern."""
    return "".join(
        one if isinstance(one, str) else _demonstration(one, recipe)
        for one in recipe.demonstrations
    )


def _demonstration(one: Demonstration, recipe: Recipe) -> str:
    if recipe.demonstration is None:
        raise ConfigError(
            "encoder.demonstration: is not set, so a demonstration of text and answer has no form;"
            " set it, with the slots {text} and {answer}, or give demonstrations as strings"
        )
    instruction = recipe.instruction if one.instruction is None else one.instruction
    runs = filled(
        recipe.demonstration,
        {
            "text": lambda: one.text,
            "answer": lambda: one.answer,
            "instruction": partial(_instruction, instruction),
        },
    )
    if len(runs) > 1:
        raise ConfigError(
            f"encoder.demonstration: {recipe.demonstration!r} has an unknown slot {{{runs[0][1]}}};"
            f" allowed are {{text}}, {{answer}} and {{instruction}} ({_BRACES})"
        )
    return runs[0][0]


def _require_marks_are_read(template: Sequence[Segment], recipe: Recipe) -> None:
    """Any span but the default one was chosen over the marks by somebody."""
    if span_rule(recipe)[0] == "all" and any(segment.pooled for segment in template):
        raise ConfigError(
            "encoder.span: got 'all', but a segment has pool: true, which only span: pooled"
            " reads; set span: pooled, or leave pool out"
        )


def _require_span(pieces: Sequence[Piece], recipe: Recipe) -> None:
    if span_rule(recipe)[0] != "pooled":
        return
    marked = [number for number, piece in enumerate(pieces) if piece.marked]
    wanted = f"tag: {recipe.span.tag}" if isinstance(recipe.span, SpanTag) else "pool: true"
    if not marked:
        raise ConfigError(
            f"encoder.span: no segment of a template has {wanted}; give it to the segments whose"
            " tokens count, or choose another span"
        )
    if marked[-1] - marked[0] + 1 != len(marked):
        raise ConfigError(
            f"encoder.span: the segments with {wanted} are not neighbours; a span is one run of"
            " tokens, so give it to those between them too, or leave some out"
        )


def _slots(template: str) -> list[tuple[str, str | None]]:
    """Each literal with the slot after it, None where the template ends or a brace is literal."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"encoder.templates: {template!r} cannot be read ({error}); {_BRACES}"
        ) from error
    found: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        dressed = f"!{conversion}" if conversion else f":{spec}" if spec else ""
        found.append((literal, None if name is None else name + dressed))
    return found
