"""What fills a template's slots beside the text: the instruction, and the demonstrations."""

from collections.abc import Callable
from functools import partial

from embedjob.braces import BRACES, filled, slots
from embedjob.errors import ConfigError
from embedjob.recipe import Recipe
from embedjob.segments import Demonstration

PATTERN = "encoder.demonstration"
_SLOTS = ("text", "answer", "instruction")


def instruction(given: str | None) -> str:
    """The instruction as it is; ConfigError where a template has a slot for one and none is set."""
    if given is None:
        raise ConfigError(
            "encoder.templates: one has an {instruction} slot, but encoder.instruction is not set;"
            " set it ('' is allowed)"
        )
    return given


def demonstrations(recipe: Recipe) -> str:
    """The few-shot examples one after another, as written or under the method's pattern."""
    if recipe.demonstration is not None:
        _require_pattern(recipe.demonstration)
    return "".join(
        one if isinstance(one, str) else _demonstration(one, recipe)
        for one in recipe.demonstrations
    )


def _require_pattern(pattern: str) -> None:
    """ConfigError unless the pattern shows all of an example, and nothing that it has not."""
    found = slots(pattern, key=PATTERN)
    if unknown := sorted(found.difference(_SLOTS)):
        raise ConfigError(
            f"{PATTERN}: {pattern!r} has an unknown slot {{{unknown[0]}}};"
            f" allowed are {{text}}, {{answer}} and {{instruction}} ({BRACES})"
        )
    if missing := [slot for slot in ("text", "answer") if slot not in found]:
        raise ConfigError(
            f"{PATTERN}: {pattern!r} has no {{{missing[0]}}}, so that it would be left out of"
            " every demonstration; add it, or give demonstrations as strings"
        )


def _demonstration(one: Demonstration, recipe: Recipe) -> str:
    if recipe.demonstration is None:
        raise ConfigError(
            "encoder.demonstration: is not set, so a demonstration of text and answer has no form;"
            " set it, with the slots {text} and {answer}, or give demonstrations as strings"
        )
    own = recipe.instruction if one.instruction is None else one.instruction
    values: dict[str, Callable[[], str]] = {
        "text": lambda: one.text,
        "answer": lambda: one.answer,
        "instruction": partial(instruction, own),
    }
    return filled(recipe.demonstration, values, key=PATTERN)[0][0]
