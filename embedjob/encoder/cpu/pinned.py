"""Source pinning: the forwards of transformers that this folder's layers are written after.

A replacement is right for one wording of the layer that it replaces. So a layer is replaced only
where its forward has the SHA-256 of a wording that was read and tested. Where an upgrade of
transformers changes a forward, the model keeps its own layer: a little slower, and never wrong.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from hashlib import sha256
from typing import Any

from torch import nn

# By version of transformers, then by class. After an upgrade, tests/encoder/cpu/test_pinned.py
# names the classes that changed: read them, and add a version with their new digests.
PINNED: Mapping[str, Mapping[str, str]] = {
    "5.23": {
        "BertLayer": "69a777dae7286531fe78f1f6f8323c8f09b4038b1a32de082f546d3bfd7d26b1",
        "BertAttention": "44bd020f8c54d9c32602977c3d55f436798b6ec1b85c5dc65cee4c103455b65f",
        "BertSelfAttention": "b25d3220c35906f6a109ce1b14bd63b3c462b9307d1d929e976809b0a7f4989c",
        "BertSelfOutput": "a89624c4a1b32bc6d5d65e01f40223446a3328bd52a62c33d1dd93a88e6febc2",
        "BertIntermediate": "527a7777b3e208eba7bfca56b121ee4404c868f336c633306c62d516d9fb3346",
        "BertOutput": "a89624c4a1b32bc6d5d65e01f40223446a3328bd52a62c33d1dd93a88e6febc2",
        "LlamaDecoderLayer": "e80116bea4d20ee023467a83af420dbd5c05a729e750c4de8068f955bc1daef1",
        "LlamaAttention": "87802b1d1fa396b45954b0b9f5872dddcabfdc750896e03fefea180ba0ff4a31",
        "LlamaMLP": "341c1b1d7a796bf1268a38126cf2de3a9ff7b45961b41ff19383352e7c6ad386",
        "LlamaRMSNorm": "9a201a0f0ba21462f9760819e34e8c7d8382283c1b7e8f88ec44081b560b9022",
        "MistralAttention": "36831b66e60c377bbb35743c7dac633aa88ad3a2350265f5ab80793fcc030ab9",
        "Qwen2Attention": "31eece33e0cb954a71890e9bfb83eba3a47e4174107f08d28bbc530b628c64b1",
        "T5LayerNorm": "ca9fad5b39ff2803f60c51910b7659af0b40a483ceb6e9b3a5b3ec14c031f1a6",
    }
}


def reads_like(kind: type[nn.Module], *names: str) -> bool:
    """Return whether a class has the pinned forward of one of these classes of transformers."""
    return any(
        digest_of(kind) == digests[name]
        for digests in PINNED.values()
        for name in names
        if name in digests
    )


def check_reads_like(layer: nn.Module, *names: str) -> None:
    """Check that a layer has the pinned forward of one of these classes; TypeError if not."""
    if not reads_like(type(layer), *names):
        raise TypeError(f"a {type(layer).__name__} does not read like a {' or '.join(names)}")


def changed_classes(layers: Iterable[nn.Module]) -> list[str]:
    """Return the names of pinned classes among the layers whose forward has another wording."""
    kinds = {type(layer) for layer in layers}
    known = {name for digests in PINNED.values() for name in digests}
    return sorted(
        kind.__name__
        for kind in kinds
        if kind.__name__ in known
        and kind.__module__.startswith("transformers.")
        and not reads_like(kind, kind.__name__)
    )


def digest_of(kind: type[nn.Module]) -> str:
    """Return the SHA-256 of a class's forward, or "" where its source is not to be had.

    Comments, annotations and the docstring are left out: models that share a layer differ in them.
    """
    return _digest(inspect.unwrap(kind.forward))


@cache
def _digest(forward: Callable[..., Any]) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(forward))
        definition = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(definition, ast.FunctionDef):
        return ""
    first = definition.body[1 if ast.get_docstring(definition) is not None else 0]
    decorators = map(ast.unparse, definition.decorator_list)
    parameters = inspect.signature(forward).parameters.values()
    plain = (str(one.replace(annotation=inspect.Parameter.empty)) for one in parameters)
    body = _without_comments(source, first.lineno)
    return sha256("\n".join([*decorators, *plain, body]).encode()).hexdigest()


def _without_comments(source: str, first_line: int) -> str:
    """Return the source from a line on as joined tokens, without comments and blank lines."""
    left_out = {tokenize.COMMENT, tokenize.NL}
    nesting = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}
    joined = "".join(
        nesting.get(token.type, token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.start[0] >= first_line and token.type not in left_out
    )
    # After a docstring the body has been indented already.
    return joined.lstrip("{")
