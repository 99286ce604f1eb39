"""Words of a text and their token ids, which PromptReps weighs.

Words are those of the Penn Treebank's tokenizer as NLTK refines it, of a lower-cased text,
without English stopwords and punctuation marks. NLTK itself would bring scipy and pandas into
every worker, and data that it downloads; a test compares the two. Sentences end as in Punkt
(Kiss and Strunk 2006), with a short list of abbreviations in place of its trained ones.
"""

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from embedjob.errors import ConfigError
from embedjob.text.arrays import Ids, flatten
from embedjob.text.views import Words

# A string of 10 MB must not cost more than a book.
_MOST_CHARACTERS = 1 << 20
_LONGEST_WORD = 64
_KEPT_WORDS = 1 << 16
# fmt: off
STOPWORDS = frozenset({
    "i", "me", "my", "myself", "we", "our", "ours", "ourselves", "you", "you're", "you've",
    "you'll", "you'd", "your", "yours", "yourself", "yourselves", "he", "him", "his", "himself",
    "she", "she's", "her", "hers", "herself", "it", "it's", "its", "itself", "they", "them",
    "their", "theirs", "themselves", "what", "which", "who", "whom", "this", "that", "that'll",
    "these", "those", "am", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had",
    "having", "do", "does", "did", "doing", "a", "an", "the", "and", "but", "if", "or", "because",
    "as", "until", "while", "of", "at", "by", "for", "with", "about", "against", "between", "into",
    "through", "during", "before", "after", "above", "below", "to", "from", "up", "down", "in",
    "out", "on", "off", "over", "under", "again", "further", "then", "once", "here", "there",
    "when", "where", "why", "how", "all", "any", "both", "each", "few", "more", "most", "other",
    "some", "such", "no", "nor", "not", "only", "own", "same", "so", "than", "too", "very", "s",
    "t", "can", "will", "just", "don", "don't", "should", "should've", "now", "d", "ll", "m", "o",
    "re", "ve", "y", "ain", "aren", "aren't", "couldn", "couldn't", "didn", "didn't", "doesn",
    "doesn't", "hadn", "hadn't", "hasn", "hasn't", "haven", "haven't", "isn", "isn't", "ma",
    "mightn", "mightn't", "mustn", "mustn't", "needn", "needn't", "shan", "shan't", "shouldn",
    "shouldn't", "wasn", "wasn't", "weren", "weren't", "won", "won't", "wouldn", "wouldn't",
    *string.punctuation,
})
_ABBREVIATIONS = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "inc", "corp", "co", "ltd", "u.s", "u.k",
    "u.n", "a.m", "p.m", "d.c", "ph.d", "vs", "etc", "e.g", "i.e", "jan", "feb", "mar", "apr",
    "aug", "sept", "oct", "nov", "dec", "gen", "sen", "rep", "gov", "lt", "col", "sgt", "capt",
})
# fmt: on

# A mark that may end a sentence, and what may then stand before the next one begins.
_END = re.compile(r"[.?!](?=[)\";}\]*:@'({\[\u2018\u2019\u201c\u201d\u00ab\u00bb?!]|\s+\S)")
_CLOSING = re.compile(
    r"\s*[\"')\]}\u2018\u2019\u201c\u201d\u00ab\u00bb]+?(?:\s+|(?=--)|$)", re.MULTILINE
)
_BLANKS = re.compile(r"\s*")
_NUMBER_OR_INITIAL = re.compile(r"-?[.,]?\d[\d,.-]*|[^\W\d]")
_OPENERS = re.compile(r"[(\"`{\[:;&#*@)}\],]+|-{2,}")
_NEVER_FIRST = frozenset(";:,.!?")

# In this order, each over the whole sentence; a blank at both ends from _CLITICS on.
_RULES = [
    (r"([\u00ab\u201c\u2018\u201e]|`+)", r" \1 "),
    (r'^"', "``"),
    (r"(``)", r" \1 "),
    (r"([ (\[{<])(\"|'{2})", r"\1 `` "),
    (r"(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),
    (r"([^.])(\.)([\])}>\"'\u00bb\u201d\u2019 ]*)\s*$", r"\1 \2 \3 "),
    (r"([:,])([^\d])", r" \1 \2"),
    (r"([:,])$", r" \1 "),
    (r"\.{2,}", r" \g<0> "),
    (r"[;@#$%&]", r" \g<0> "),
    (r"[\u2012-\u2015]", r" \g<0> "),
    (r"([^.])(\.)([\])}>\"']*)\s*$", r"\1 \2\3 "),
    (r"[?!]", r" \g<0> "),
    (r"([^'])' ", r"\1 ' "),
    (r"[*]", r" \g<0> "),
    (r"[\]\[(){}<>]", r" \g<0> "),
    (r"--", " -- "),
]
_CLITICS = [
    (r"([\u00bb\u201d\u2019])", r" \1 "),
    (r"''|\"", " '' "),
    (r"\s+", " "),
    (r"([^' ])('[smd]|') ", r"\1 \2 "),
    (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    (r"\b(can)(not)\b", r" \1 \2 "),
    (r"\b(d)('ye)\b", r" \1 \2 "),
    (r"\b(gim|lem)(me)\b", r" \1 \2 "),
    (r"\b(gon)(na)\b", r" \1 \2 "),
    (r"\b(got)(ta)\b", r" \1 \2 "),
    (r"\b(more)('n)\b", r" \1 \2 "),
    (r"\b(wan)(na)(?=\s)", r" \1 \2 "),
    (r" ('t)(is|was)\b", r" \1 \2 "),
]
_COMPILED_RULES, _COMPILED_CLITICS = (
    [(re.compile(pattern), by) for pattern, by in rules] for rules in (_RULES, _CLITICS)
)


class WordIds:
    """The ids of texts' words, under one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer."""
        self._tokenizer = tokenizer
        self._ids = lru_cache(_KEPT_WORDS)(self._encoded)

    def __call__(self, texts: Sequence[str]) -> Words:
        """Return per text the distinct ids, ascending, of each word in its first 2^20 characters.

        A word is tokenized alone.
        """
        rows = [self._of(text) for text in texts]
        return Words(*flatten(rows))

    def _of(self, text: str) -> list[int]:
        kept = set(words(text[:_MOST_CHARACTERS].lower())) - STOPWORDS
        return sorted({token for word in kept for token in self._ids(word)})

    def _encoded(self, word: str) -> tuple[int, ...]:
        # A special token typed in a text is a word like any other.
        before = self._tokenizer.encode_special_tokens
        self._tokenizer.encode_special_tokens = True
        try:
            return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        finally:
            self._tokenizer.encode_special_tokens = before


def stops(tokenizer: Tokenizer, until: str) -> Ids:
    """Return the ids whose text contains `until`, which end a decoding; ConfigError without any."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    texts = tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    matching = [token for token, text in enumerate(texts) if until in text]
    if not matching:
        raise ConfigError(
            f"encoder.decode.until: got {until!r}, which no token of this tokenizer contains;"
            " set a shorter text"
        )
    return np.array(matching, np.uint32)


def words(text: str) -> Iterable[str]:
    """Yield the words and marks of a lower-cased text."""
    return (word for sentence in sentences(text) for word in _split(sentence))


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a lower-cased text, each with its closing quotes."""
    start = 0
    for mark in _END.finditer(text):
        if mark.start() < start or (mark[0] == "." and _goes_on(text, start, mark.end())):
            continue
        closing = _CLOSING.match(text, mark.end())
        stop = closing.end() if closing else mark.end()
        yield text[start:stop].rstrip()
        start = _BLANKS.match(text, stop).end()  # type: ignore[union-attr]
    yield text[start:].rstrip()


def _goes_on(text: str, start: int, stop: int) -> bool:
    """Return whether the full stop before `stop` ends an abbreviation, a number or an ellipsis."""
    before = text[max(start, stop - _LONGEST_WORD) : stop - 1]
    word = _OPENERS.split(before.split()[-1])[-1] if before[-1:].strip() else ""
    if word.endswith(".") or {word, word.rpartition("-")[2]} & _ABBREVIATIONS:
        return True
    follows = text[_BLANKS.match(text, stop).end()]  # type: ignore[union-attr]
    after = follows.islower() or follows in _NEVER_FIRST
    return bool(after and _NUMBER_OR_INITIAL.fullmatch(word))


def _split(sentence: str) -> list[str]:
    for pattern, by in _COMPILED_RULES:
        sentence = pattern.sub(by, sentence)
    sentence = f" {sentence} "
    for pattern, by in _COMPILED_CLITICS:
        sentence = pattern.sub(by, sentence)
    return sentence.split()
