"""Templates around a text: parsed once, rendered per row."""

import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from embedjob.config import Recipe, WeightedTemplate
from embedjob.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """One template, its other slots filled: what stands before the text and after it."""

    before: str
    after: str
    weight: float = 1.0
    strip: bool = False

    def render(self, text: str) -> str:
        """The whole prompt with the text in its slot."""
        whole = self.before + text + self.after
        return whole.strip() if self.strip else whole

    def text_start(self, text: str) -> int:
        """Where in `render(text)` the text begins; negative if stripping ate into it."""
        if not self.strip:
            return len(self.before)
        whole = self.before + text + self.after
        return len(self.before) - (len(whole) - len(whole.lstrip()))


def prompts(recipe: Recipe) -> tuple[Prompt, ...]:
    """The recipe's templates in order, one view each."""
    return tuple(_prompt(template, recipe) for template in recipe.templates)


def _prompt(template: object, recipe: Recipe) -> Prompt:
    if isinstance(template, WeightedTemplate):
        return replace(_prompt(template.template, recipe), weight=template.weight)
    if not isinstance(template, str):
        raise ConfigError(
            f"encoder.templates: got {template!r}; allowed is a string with one {{text}} slot"
        )
    before, *after = _fill(template, recipe.instruction)
    if len(after) != 1:
        raise ConfigError(
            f"encoder.templates: {template!r} has {len(after)} {{text}} slots;"
            " exactly one is allowed (write a literal brace as '{{' or '}}')"
        )
    return Prompt(before, after[0], strip=recipe.prepare == "eol")


def _fill(template: str, instruction: str | None) -> list[str]:
    """The template's pieces around its text slots, other slots filled."""
    pieces = [""]
    for literal, slot in _slots(template):
        pieces[-1] += literal
        if slot == "text":
            pieces.append("")
        elif slot == "instruction":
            if instruction is None:
                raise ConfigError(
                    f"encoder.templates: {template!r} has an {{instruction}} slot,"
                    " but encoder.instruction is not set; set it ('' is allowed)"
                )
            pieces[-1] += instruction
        elif slot is not None:
            raise ConfigError(
                f"encoder.templates: {template!r} has an unknown slot {{{slot}}};"
                " allowed are {text} and {instruction} (a literal brace is '{{' or '}}')"
            )
    return pieces


def _slots(template: str) -> list[tuple[str, str | None]]:
    """Each literal with the slot after it, None where the template ends or a brace is literal."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"encoder.templates: {template!r} cannot be read ({error});"
            " a literal brace is written '{{' or '}}'"
        ) from error
    found: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        dressed = f"!{conversion}" if conversion else f":{spec}" if spec else ""
        found.append((literal, None if name is None else name + dressed))
    return found


def prepare(name: str) -> Callable[[str], str]:
    """The text cleaning of that name."""
    return _PREPARATIONS[name]


def _as_read(text: str) -> str:
    """The text itself."""
    return text


def _eol(text: str) -> str:
    """The cleaning shared by PromptEOL and its followers; an empty text stays empty."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


_PREPARATIONS: dict[str, Callable[[str], str]] = {"none": _as_read, "eol": _eol}
