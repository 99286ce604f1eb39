"""A tokenizer's twin, to which the special tokens written in a text are plain text."""

import json
import secrets
from typing import Any

from tokenizers import Tokenizer

# Shorter ones are ordinary characters that someone marked as special, such as CLIP's "!".
_SHORTEST = 3
_PRIVATE_PLANE, _PRIVATE_CHARACTERS = 0xF0000, 0xFFFE


def twin(tokenizer: Tokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """An equal tokenizer whose special tokens have secret names, and the name of each.

    A template written with the secret names gives the ids it always gave, and no text can hold
    one: what looks like a special token in a text is cut like any other characters. Names are as
    long as what they replace, so character offsets do not move; they never show in any id.
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
    """Every token that a BPE model builds from others, or builds others from."""
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
