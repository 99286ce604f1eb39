"""Prompt encoding: special tokens are parsed in templates and never in texts."""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, processors

from embedjob.text.arrays import Flags, Ints, flatten, offsets_of
from embedjob.text.prompts import Prompt

# Shorter tokens are ordinary characters marked as special, such as CLIP's "!".
_SHORTEST = 3
_PRIVATE_PLANE, _PRIVATE_CHARACTERS = 0xF0000, 0xFFFE


def secret_twin(tokenizer: Tokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """Return an equal tokenizer whose special tokens have secret names, and the name of each.

    A template written with the secret names keeps its ids, and no text can hold such a name: a
    special token's old name in a text is tokenized like any other characters. Secret names are as
    long as the names that they replace, so character offsets do not move; they never show in any
    id.
    """
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    specials = [token for token in document["added_tokens"] if token["special"]]
    words = _merged(document["model"])
    names: dict[str, str] = {}
    for token in specials:
        if len(token["content"]) >= _SHORTEST and token["content"] not in words:
            names[token["content"]] = token["content"] = _secret(len(token["content"]))
    # In the model's own vocabulary too, where a whole-word match (Unigram, WordPiece) or
    # ignore_merges would still find the old name. Places keep the ids.
    _rename(document["model"], names)
    renamed = Tokenizer.from_str(json.dumps(document))
    for content, name in names.items():
        assert renamed.token_to_id(name) == tokenizer.token_to_id(content), content
    return renamed, names


def _secret(length: int) -> str:
    return "".join(
        chr(_PRIVATE_PLANE + secrets.randbelow(_PRIVATE_CHARACTERS)) for _ in range(length)
    )


def _merged(model: dict[str, Any]) -> set[str]:
    """Return every token that a BPE model merges, or merges tokens into."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ())
    return {word for left, right in pairs for word in (left, right, left + right)}


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(word, word), score] for word, score in vocabulary]
    else:
        model["vocab"] = {names.get(word, word): token for word, token in vocabulary.items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


# Rare characters, unknown to every tokenizer that has an unknown token.
_UNKNOWN = "\U00012000\U00013000\U0001f701"


@dataclass(frozen=True)
class Frame:
    """How many special tokens the tokenizer itself puts before and after a prompt."""

    before: int
    after: int


class PromptEncoder:
    """Encodes texts under templates; owns its tokenizer, whose truncation it switches off."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, special_tokens: bool
    ) -> None:
        """Take the tokenizer; `special_tokens` says whether it may add its own, such as BOS."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        _keep_blanks_in_offsets(tokenizer)
        self._tokenizer = tokenizer
        self._prompts = tuple(prompts)
        self._adds = special_tokens
        self.frame = self._find_frame()
        self._special, self._unknown = _special_ids(tokenizer)
        probes = self._run(tokenizer, self._prompts, range(len(prompts)), ["a"] * len(prompts))
        flat, offsets = flatten([encoding.ids for encoding in probes])
        self._expected = _count(self._special[flat], offsets)

    def encode(
        self, which: Sequence[int], texts: Sequence[str], *, offsets: bool
    ) -> list[Encoding]:
        """Encode each text under template number `which`; offsets are valid only if requested."""
        encodings = self._run(self._tokenizer, self._prompts, which, texts, offsets=offsets)
        for row in self._with_literals(encodings, which, texts):
            renamed, prompts = self._twin
            encodings[row] = self._run(renamed, prompts, [which[row]], [texts[row]], offsets=True)[
                0
            ]
        return encodings

    def count_alone(self, before: str) -> int:
        """Count the tokens of a prompt's beginning alone, without the closing special tokens."""
        return len(self._tokenizer.encode(before, add_special_tokens=self._adds)) - self.frame.after

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as the tokenizer spells them; an id that it does not know as `<id>`."""
        return [self._tokenizer.id_to_token(token) or f"<{token}>" for token in ids]

    def text_tokens(
        self, encodings: Sequence[Encoding], which: Sequence[int], texts: Sequence[str]
    ) -> Ints:
        """Return the positions [N, 2] of each text's tokens; start == stop if it has none.

        A text with no template before it starts right after the tokenizer's own special tokens, and
        likewise at its end: some tokenizers give a leading blank no characters.
        """
        positions = self.framed(np.fromiter(map(len, encodings), np.int64, len(encodings)))
        for row, (encoding, template, text) in enumerate(zip(encodings, which, texts, strict=True)):
            positions[row] = self._overlap(encoding, self._prompts[template], text)
        return positions

    def marked_tokens(
        self, encodings: Sequence[Encoding], which: Sequence[int], texts: Sequence[str]
    ) -> Ints:
        """Return the positions [N, 2] of the tokens that overlap marked segments."""
        positions = np.zeros((len(encodings), 2), np.int64)
        if not any(prompt.marked for prompt in self._prompts):
            return positions
        for row, (encoding, template, text) in enumerate(zip(encodings, which, texts, strict=True)):
            prompt = self._prompts[template]
            if prompt.marked is not None:
                start, stop = (prompt.at(place, text) for place in prompt.marked)
                whole = prompt.render(text)
                positions[row] = self._tokens(
                    encoding, max(start, 0), stop, opens=start <= 0, closes=stop >= len(whole)
                )
        return positions

    def _overlap(self, encoding: Encoding, prompt: Prompt, text: str) -> tuple[int, int]:
        start = prompt.text_start(text)
        opens = not (prompt.before or prompt.between) or start <= 0
        return self._tokens(
            encoding, start, start + len(text), opens=opens, closes=not prompt.after
        )

    def _tokens(
        self, encoding: Encoding, start: int, stop: int, *, opens: bool, closes: bool
    ) -> tuple[int, int]:
        """Return the tokens over these characters, which may open or close the prompt."""
        first: int | None = self.frame.before
        last: int | None = len(encoding) - self.frame.after
        if not opens:
            first = encoding.char_to_token(start)
        if not closes:
            last = encoding.char_to_token(stop)
        # No token holds that character, or a token holds it and some of the text: count tokens.
        if first is None:
            first = self._count_before(encoding, start)
        if last is None or (not closes and _first_character(encoding, last) < stop):
            last = self._count_until(encoding, stop)
        return first, max(first, last) if start < stop else first

    def framed(self, lengths: Ints) -> Ints:
        """Return the positions [N, 2] of all tokens but the tokenizer's own special tokens."""
        return np.stack(
            [np.full_like(lengths, self.frame.before), lengths - self.frame.after], axis=1
        )

    def text_start(self, which: int, text: str) -> int:
        """Return where in the rendered prompt the text begins, in characters."""
        return self._prompts[which].text_start(text)

    def _count_before(self, encoding: Encoding, start: int) -> int:
        """Return the first token that ends after this character begins."""
        ranges = encoding.offsets[self.frame.before : len(encoding) - self.frame.after]
        return self.frame.before + sum(end <= start for _, end in ranges)

    def _count_until(self, encoding: Encoding, stop: int) -> int:
        """Return one past the last token that begins before this character."""
        ranges = encoding.offsets[self.frame.before : len(encoding) - self.frame.after]
        return len(encoding) - self.frame.after - sum(begin >= stop for begin, _ in ranges)

    def _run(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        which: Sequence[int],
        texts: Sequence[str],
        offsets: bool = False,
    ) -> list[Encoding]:
        pairs = zip(which, texts, strict=True)
        rendered = [prompts[template].render(text) for template, text in pairs]
        run = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
        return run(rendered, add_special_tokens=self._adds)

    def _find_frame(self) -> Frame:
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=self._adds).ids
        extra = len(full) - len(bare)
        before = next(n for n in range(extra + 1) if full[n : n + len(bare)] == bare)
        return Frame(before=before, after=extra - before)

    def _with_literals(
        self, encodings: Sequence[Encoding], which: Sequence[int], texts: Sequence[str]
    ) -> list[int]:
        """Return the rows with more special tokens than their template: the text spells some.

        Counting ids also catches special tokens that a normalizer, or the seam to the template,
        made.
        """
        if not self._special.any():
            return []
        flat, offsets = flatten([encoding.ids for encoding in encodings])
        more = _count(self._special[flat], offsets) != self._expected[np.asarray(which, np.int64)]
        # An unknown word has that id too, so look for the names of these tokens in the text.
        for token, name in self._unknown.items():
            for row in np.flatnonzero(_count(flat == token, offsets)).tolist():
                more[row] |= name in texts[row] or name in self._normalized(texts[row])
        return [int(row) for row in np.flatnonzero(more)]

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    @cached_property
    def _twin(self) -> tuple[Tokenizer, tuple[Prompt, ...]]:
        """Return the tokenizer and the templates with secret names, made when first needed."""
        renamed, names = secret_twin(self._tokenizer)
        longest_first = sorted(names, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

        def rewrite(piece: str) -> str:
            return pattern.sub(lambda match: names[match.group()], piece)

        return renamed, tuple(
            replace(
                prompt,
                before=rewrite(prompt.before),
                after=rewrite(prompt.after),
                between=tuple(map(rewrite, prompt.between)),
            )
            for prompt in self._prompts
        )


class TokenCounter:
    """Counts the tokens that texts have by themselves; special tokens that they spell are text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer, and own it as `PromptEncoder` does."""
        self._encoder = PromptEncoder(tokenizer, (Prompt("", ""),), special_tokens=False)

    def __call__(self, texts: Sequence[str]) -> Ints:
        """Return the number of tokens of each text [N]."""
        encodings = self._encoder.encode([0] * len(texts), texts, offsets=False)
        return np.fromiter(map(len, encodings), np.int64, len(texts))


def _keep_blanks_in_offsets(tokenizer: Tokenizer) -> None:
    """Let byte-level tokens own their leading blank, or a blank text would own no token."""
    whole: Any = tokenizer.post_processor
    # Not by a direct isinstance in the loop: the stubs do not say that a Sequence is iterable.
    is_sequence = isinstance(whole, processors.Sequence)
    for part in whole if is_sequence else [whole]:
        if isinstance(part, processors.ByteLevel | processors.RobertaProcessing):
            part.trim_offsets = False


def _special_ids(tokenizer: Tokenizer) -> tuple[Flags, dict[int, str]]:
    """Return which ids are special [vocabulary], and the names of those that unknown words get."""
    added = tokenizer.get_added_tokens_decoder()
    names = {token: entry.content for token, entry in added.items() if entry.special}
    unknown = names.keys() & set(tokenizer.encode(_UNKNOWN, add_special_tokens=False).ids)
    highest = max([tokenizer.get_vocab_size(with_added_tokens=True) - 1, *added])
    special = np.zeros(highest + 1, np.bool_)
    special[[token for token in names if token not in unknown]] = True
    return special, {token: names[token] for token in unknown}


def _first_character(encoding: Encoding, token: int) -> int:
    characters = encoding.token_to_chars(token)
    return -1 if characters is None else int(characters[0])


def _count(flags: Flags, rows: Ints) -> Ints:
    """Return how many flags are set in each row [N]."""
    total = offsets_of(flags.astype(np.int8))
    return total[rows[1:]] - total[rows[:-1]]
