"""Joint templates as the string around a text, and the named cleanings of a text."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedjob.config.recipe import Recipe
from embedjob.config.templates import STRIPPING, Piece, alone, templates


@dataclass(frozen=True)
class Place:
    """A place in a rendered prompt: how many texts, and template characters, stand before it."""

    texts: int
    characters: int


@dataclass(frozen=True)
class Prompt:
    """One template, its other slots filled: what stands before the text and after it.

    With several text slots, `between` stands between them, and "the text" is the last of them.
    """

    before: str
    after: str
    weight: float = 1.0
    strip: bool = False
    between: tuple[str, ...] = ()
    marked: tuple[Place, Place] | None = None

    @property
    def copies(self) -> int:
        """How many text slots there are."""
        return len(self.between) + 1

    @property
    def shown(self) -> str:
        """The template for people, shortened."""
        whole = "{text}".join([self.before, *self.between, self.after])
        return repr(whole if len(whole) <= 200 else f"{whole[:100]} ... {whole[-100:]}")

    def render(self, text: str) -> str:
        """The whole prompt with the text in its slots."""
        whole = self._whole(text)
        return whole.strip() if self.strip else whole

    def text_start(self, text: str) -> int:
        """Where in `render(text)` the text begins; negative if stripping ate into it."""
        return self.at(Place(len(self.between), len(self.before + "".join(self.between))), text)

    def at(self, place: Place, text: str) -> int:
        """Where in `render(text)` the place is; negative if stripping ate into it."""
        found = place.texts * len(text) + place.characters
        if not self.strip:
            return found
        whole = self._whole(text)
        return found - (len(whole) - len(whole.lstrip()))

    def _whole(self, text: str) -> str:
        return text.join([self.before, *self.between, self.after])


def prompts(recipe: Recipe) -> tuple[Prompt, ...]:
    """The recipe's joint templates in order, one view each."""
    strip = recipe.prepare in STRIPPING
    return tuple(_prompt(one.pieces, one.weight, strip) for one in templates(recipe))


def tails(recipe: Recipe) -> tuple[Prompt, ...]:
    """What of each joint template is tokenized by itself too, to count its tokens."""
    return tuple(_prompt(one.pieces, one.weight, False) for one in alone(recipe))


def _prompt(pieces: Sequence[Piece], weight: float, strip: bool) -> Prompt:
    literals = [""]
    marks = []
    for piece in pieces:
        start = Place(len(literals) - 1, sum(map(len, literals)))
        if piece.content is None:
            literals.append("")
        else:
            literals[-1] += piece.content
        if piece.marked:
            marks += [start, Place(len(literals) - 1, sum(map(len, literals)))]
    before, *between, after = literals
    marked = (marks[0], marks[-1]) if marks else None
    return Prompt(before, after, weight, strip, tuple(between), marked)


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


def _moee(text: str) -> str:
    """MoEE's variant: an exclamation or question mark ends a text, and underscores are blanks."""
    if text and text[-1] not in ".?!\"'":
        text += "."
    return text.replace('"', "'").replace("_", " ")


def _fullstop(text: str) -> str:
    """A full stop after a text that ends in no punctuation; an empty text stays empty."""
    return text + "." if text and text[-1] not in string.punctuation else text


_PREPARATIONS: dict[str, Callable[[str], str]] = {
    "none": _as_read,
    "eol": _eol,
    "moee": _moee,
    "fullstop": _fullstop,
    "strip": str.strip,
    "rstrip": str.rstrip,
}
