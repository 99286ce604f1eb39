"""Prompts: templates as the strings around a text, and the text cleanings of the literature."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedjob.config.recipe import Recipe
from embedjob.config.templates import STRIPPING, FilledSegment, templates, tokenized_alone


@dataclass(frozen=True)
class Place:
    """A place in a rendered prompt: how many texts, and template characters, stand before it."""

    texts: int
    characters: int


@dataclass(frozen=True)
class Prompt:
    """One template with its other slots filled: the strings before and after the text.

    With several text slots, `between` holds the strings between them, and "the text" is in the
    last slot.
    """

    before: str
    after: str
    weight: float = 1.0
    strip: bool = False
    between: tuple[str, ...] = ()
    marked: tuple[Place, Place] | None = None

    @property
    def copies(self) -> int:
        """Return the number of text slots."""
        return len(self.between) + 1

    @property
    def shown(self) -> str:
        """Return the template for people, shortened."""
        whole = "{text}".join([self.before, *self.between, self.after])
        return repr(whole if len(whole) <= 200 else f"{whole[:100]} ... {whole[-100:]}")

    def render(self, text: str) -> str:
        """Return the whole prompt with the text in its slots."""
        whole = self._whole(text)
        return whole.strip() if self.strip else whole

    def text_start(self, text: str) -> int:
        """Return where in `render(text)` the text begins; negative if stripping cut into it."""
        return self.at(Place(len(self.between), len(self.before + "".join(self.between))), text)

    def at(self, place: Place, text: str) -> int:
        """Return where in `render(text)` the place is; negative if stripping cut into it."""
        position = place.texts * len(text) + place.characters
        if not self.strip:
            return position
        whole = self._whole(text)
        return position - (len(whole) - len(whole.lstrip()))

    def _whole(self, text: str) -> str:
        return text.join([self.before, *self.between, self.after])


def prompts(recipe: Recipe) -> tuple[Prompt, ...]:
    """Return the recipe's templates that are tokenized as one string, in order, one view each."""
    strip = recipe.prepare in STRIPPING
    return tuple(
        _prompt(template.segments, template.weight, strip) for template in templates(recipe)
    )


def tails(recipe: Recipe) -> tuple[Prompt, ...]:
    """Return the part of each template that is also tokenized alone, to count its tokens."""
    return tuple(
        _prompt(template.segments, template.weight, False) for template in tokenized_alone(recipe)
    )


def _prompt(segments: Sequence[FilledSegment], weight: float, strip: bool) -> Prompt:
    literals = [""]
    marks = []
    for segment in segments:
        start = Place(len(literals) - 1, sum(map(len, literals)))
        if segment.content is None:
            literals.append("")
        else:
            literals[-1] += segment.content
        if segment.marked:
            marks += [start, Place(len(literals) - 1, sum(map(len, literals)))]
    before, *between, after = literals
    marked = (marks[0], marks[-1]) if marks else None
    return Prompt(before, after, weight, strip, tuple(between), marked)


def prepare(name: str) -> Callable[[str], str]:
    """Return the text cleaning of that name."""
    return _PREPARATIONS[name]


def _as_read(text: str) -> str:
    """Return the text itself."""
    return text


def _eol(text: str) -> str:
    """Clean a text as PromptEOL and its followers do; an empty text stays empty."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def _moee(text: str) -> str:
    """Clean a text as MoEE does: `!` and `?` end a text too, and underscores become blanks."""
    if text and text[-1] not in ".?!\"'":
        text += "."
    return text.replace('"', "'").replace("_", " ")


def _fullstop(text: str) -> str:
    """End a text with a full stop unless it ends in punctuation; an empty text stays empty."""
    return text + "." if text and text[-1] not in string.punctuation else text


_PREPARATIONS: dict[str, Callable[[str], str]] = {
    "none": _as_read,
    "eol": _eol,
    "moee": _moee,
    "fullstop": _fullstop,
    "strip": str.strip,
    "rstrip": str.rstrip,
}
