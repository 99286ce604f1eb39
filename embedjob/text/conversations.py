"""Conversations: what a generator is asked about a text, with draws that depend on nothing else.

A draw depends on the text, the seed, the kind and its number: any retry, order, batch or number of
actors draws the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedjob.config.generation import SLOT, Generation, Transformation
from embedjob.config.segments import Demonstration
from embedjob.text.fitting import WholePromptFitter
from embedjob.text.prompts import Prompt

Message = Mapping[str, str]
Conversation = tuple[Message, ...]
# Stands for the text while a conversation is written: no template changes such characters.
MARK = "\ue000\ue001"
# A summary is a kind of its own in the files, beside the answer that it sums up.
SUMMARY = " summary"
_HASH_BYTES = 16


@dataclass(frozen=True)
class Variant:
    """What a generator made of a text: its kind and number, and its tokens.

    `text` is null where the generator failed or said nothing.
    """

    kind: str
    number: int
    text: str | None
    tokens: int


def text_hash(text: str) -> bytes:
    """Return the 16 bytes by which a text is known, as outputs have it."""
    return hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()


def draw_key(of: bytes, *, seed: int, kind: str, number: int) -> bytes:
    """Return the key of all draws for one answer: of a text's hash, the seed, kind and number."""
    named = f"embedjob generation 1 {seed} {kind} {number} ".encode() + of
    return hashlib.blake2b(named, digest_size=_HASH_BYTES).digest()


def uniforms(key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Return numbers [count] in [0, 1), by Philox, whose stream no release of numpy changes."""
    stream = np.random.Philox(key=int.from_bytes(key, "little"))
    raw: npt.NDArray[np.float64] = (stream.random_raw(count) >> np.uint64(11)).astype(np.float64)
    return raw * 2.0**-53


def drawn_shots(
    key: bytes, demonstrations: Sequence[Demonstration], count: int
) -> tuple[Demonstration, ...]:
    """Return so many of the demonstrations, in a random order, each at most once."""
    order = sorted(
        range(len(demonstrations)),
        key=lambda one: hashlib.blake2b(f"shot {one}".encode(), key=key).digest(),
    )
    return tuple(demonstrations[one] for one in order[:count])


def transforming(generation: Generation, kind: str, shots: Sequence[Demonstration]) -> Conversation:
    """Return the conversation that asks for one kind of text, with the mark in the text's place."""
    asked: Transformation = generation.kinds[kind]
    opening = (_user(asked.instruction), _assistant(generation.acknowledgement))
    turns = (turn for one in shots for turn in (_user(one.text), _assistant(one.answer)))
    return (*opening, *turns, _user(MARK))


def longest_shots(demonstrations: Sequence[Demonstration], count: int) -> list[Demonstration]:
    """Return so many of the demonstrations, those with the most characters."""
    return sorted(demonstrations, key=lambda one: -len(one.text) - len(one.answer))[:count]


def summing_up(generation: Generation) -> Conversation:
    """Return the conversation that asks for a summary, with the mark in the text's place."""
    return (_user(generation.summary.replace(SLOT, MARK)),)


def as_prompt(written: str) -> Prompt | None:
    """Return a written conversation as what stands before and after the text.

    None where the template has left the text out, or repeats it.
    """
    before, mark, after = written.partition(MARK)
    return Prompt(before, after) if mark and MARK not in after else None


def cleaned(answer: str) -> str | None:
    """Return an answer without blanks at its ends and without a leading name of the speaker.

    None where nothing is left.
    """
    return answer.lstrip().removeprefix("assistant\n\n").strip() or None


def embedded_texts(text: str, variants: Sequence[Variant]) -> list[str]:
    """Return the texts that are embedded beside a text, in the order of kinds and numbers.

    A summary takes the place of what it sums up. What the generator did not make is the text.
    """
    made: dict[tuple[str, int], str] = {}
    for variant in variants:
        key = (variant.kind.removesuffix(SUMMARY), variant.number)
        made[key] = variant.text or made.get(key, text)
    return list(made.values())


class ConversationEncoder:
    """Tokenizes conversations about texts; special tokens that a text spells are text."""

    def __init__(self, tokenizer: Tokenizer, *, most: int) -> None:
        """Take the tokenizer, and the most tokens of a prompt: a text is cut to fit."""
        self._tokenizer = tokenizer
        self._most = most

    def ids(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text in its prompt."""
        if not prompts:
            return []
        # A chat template writes the special tokens itself.
        fitter = WholePromptFitter(self._tokenizer, prompts, special_tokens=False, needs_text=False)
        fitter.limit(np.full(len(prompts), self._most, np.int64))
        return fitter.fit(range(len(prompts)), texts).ids

    def length(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt with a short text in it."""
        fitter = WholePromptFitter(
            self._tokenizer, [prompt], special_tokens=False, needs_text=False
        )
        return len(fitter.whole(0, "a"))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
