"""Globs against the standard library's, on real trees."""

import glob
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.storage.patterns import is_magic, matches, may_lead, stem

NAMES = st.sampled_from(["a", "b", "ab", "a.p", "b.p", "c=1", "c=2"])
TREES = st.sets(st.lists(NAMES, min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)
PARTS = st.sampled_from(["*", "a*", "?", "*.p", "[ab]", "c=*", "[!a]*", "a", "**"])
PATTERNS = st.lists(PARTS, min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=300)
@given(tree=TREES, pattern=PATTERNS)
def test_equals_the_standard_library(tree: set[tuple[str, ...]], pattern: tuple[str, ...]) -> None:
    # A name cannot be a file and a folder.
    folders = {path[:i] for path in tree for i in range(1, len(path))}
    files = tree - folders
    with tempfile.TemporaryDirectory() as root:
        for file in files:
            path = Path(root, *file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        expected = set()
        for found in glob.glob(os.path.join(root, *pattern), recursive=True):
            path = Path(found)
            if found.endswith("/") and path.is_file():
                continue  # glob says "a/" for "a/**" even where a is a file
            inner = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            expected |= {p.relative_to(root).parts for p in inner}
    assert {file for file in files if matches(file, pattern)} == expected


@given(path=st.lists(NAMES, min_size=1, max_size=5), pattern=PATTERNS)
def test_a_walk_that_asks_may_lead_reaches_every_match(
    path: list[str], pattern: tuple[str, ...]
) -> None:
    if matches(path, pattern):
        assert all(may_lead(path[:i], pattern) for i in range(len(path)))
        assert path[0].startswith(stem(pattern[0]))


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a/b", "", True),
        ("a/_b", "", False),
        (".a/b", "", False),
        ("_a", "*", False),
        ("_a", "_*", True),
        ("_a/.b", "_*", False),
        ("_a/b", "**", False),
        ("a/_b/c", "**/c", False),
        ("a/_b/c", "**/_b/*", True),
        ("a", "a/**", False),
        ("a/b/c/d", "a/**/d", True),
        ("ab", "a", False),
        ("x/y", "*", True),
    ],
)
def test_hidden_names_only_where_asked_for(path: str, pattern: str, expected: bool) -> None:
    wanted = pattern.split("/") if pattern else []
    assert matches(path.split("/"), wanted) is expected


@pytest.mark.parametrize(
    ("text", "magic", "begin"),
    [("plain", False, "plain"), ("a*b", True, "a"), ("?", True, ""), ("x[1]", True, "x")],
)
def test_wildcards_are_seen(text: str, magic: bool, begin: str) -> None:
    assert is_magic(text) is magic
    assert stem(text) == begin
