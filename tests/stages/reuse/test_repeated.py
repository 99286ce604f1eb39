"""Texts that several chunks have: who encodes them, and that everybody gets the same."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.errors import InterruptedRunError
from embedjob.stages.chunk_state import ChunkState, from_block, to_block
from embedjob.stages.ledger import new_ledger
from embedjob.stages.reuse import repeated
from embedjob.stages.reuse.repeated import TextOwners, encode_once
from embedjob.stages.tokenize import tokenize_rows
from embedjob.text.conversations import text_hash
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded
from tests.stages.reuse.chunk_rows import CHUNK, KINDS, PLAIN, encoded, rows

KEYS, TEXTS = ["chunk 1", "chunk 2", "chunk 3"], [bytes([n]) * 16 for n in range(3)]
ACTS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "insist", "made", "released"]),
        st.sampled_from(KEYS),
        st.lists(st.sampled_from(TEXTS), unique=True),
    ),
    max_size=30,
)


@given(ACTS)
def test_a_text_has_one_owner_and_what_is_taken_was_made_by_it(
    acts: list[tuple[str, str, list[bytes]]],
) -> None:
    owners = TextOwners()
    encodes: dict[bytes, str] = {}
    made: dict[bytes, Any] = {}
    for number, (act, key, hashes) in enumerate(acts):
        if act in ("ask", "insist"):
            for one, answer in zip(
                hashes, owners.ask(key, hashes, insist=act == "insist"), strict=True
            ):
                first = encodes.get(one) in (None, key)
                assert answer == (
                    "encode" if first or act == "insist" else made.get(one, "wait")
                ), (one, answer)
                if answer == "encode":
                    encodes[one] = key
                    made.pop(one, None)
        elif act == "made":
            owners.made(key, hashes, [number])
            made |= {
                one: (number, place) for place, one in enumerate(hashes) if encodes.get(one) == key
            }
        else:
            owners.released(key)
            for one in [one for one, own in encodes.items() if own == key and one not in made]:
                del encodes[one]


def state_of(key: str, texts: Sequence[str | None], again: Sequence[str]) -> ChunkState:
    """A chunk as it comes to an encoder; `again` are the texts that others have, too."""
    made, views = tokenize_rows(rows([*texts]), PLAIN, "truncate")
    chunk = replace(CHUNK, name=key, stop=len(texts))
    hashes = b"".join(map(text_hash, again))
    [arrived] = from_block(to_block([ChunkState(chunk, made, views, repeated=hashes)]))
    return arrived


class Given:
    """Counts the texts that encoders are given, by their ids; each text takes a while."""

    def __init__(self, kind: str = "plain", seconds: float = 0.0) -> None:
        self.kind, self.seconds = kind, seconds
        self.texts: Counter[bytes] = Counter()
        self.lock = threading.Lock()

    def encode(self, views: TokenViews) -> Encoded:
        time.sleep(self.seconds * views.texts)
        with self.lock:
            self.texts.update(views.full_ids(one).tobytes() for one in range(views.texts))
        stats = {"forward_tokens": float(views.lengths.sum()), "distinct_views": views.texts}
        return replace(encoded(views, self.kind), stats=stats)


def equal(left: Encoded, right: Encoded) -> None:
    np.testing.assert_array_equal(left.embeddings, right.embeddings)
    np.testing.assert_array_equal(left.line_offsets, right.line_offsets)
    assert left.failed == right.failed
    assert (left.lines is None) == (right.lines is None)
    if left.lines is not None and right.lines is not None:
        np.testing.assert_array_equal(left.lines.chars, right.lines.chars)
    if left.sparse is not None and right.sparse is not None:
        for name in ("offsets", "indices", "values"):
            np.testing.assert_array_equal(getattr(left.sparse, name), getattr(right.sparse, name))
    for name in ("sparse", "routers"):
        assert (getattr(left, name) is None) == (getattr(right, name) is None)
    if left.routers is not None:
        np.testing.assert_array_equal(left.routers, right.routers)


def in_order(kind: str, views: TokenViews, parts: list[list[int]], failed: set[int]) -> Encoded:
    """Parts that were encoded apart; a text in `failed` has failed in its part."""
    some = [np.array(part, np.int64) for part in parts]
    made = []
    for part in some:
        whys = {n: ("bad", str(text)) for n, text in enumerate(part.tolist()) if text in failed}
        stats = {"texts": len(part)}
        made.append(replace(encoded(views.take(part), kind), failed=whys, stats=stats))
    return repeated._in_order(made, some)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_parts_that_were_encoded_apart_are_whole_again(kind: str, data: st.DataObject) -> None:
    texts = [f"text of number {number} {'and more ' * (number % 3)}" for number in range(6)]
    views = PLAIN.views(texts)
    order = data.draw(st.permutations(range(6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 6], strict=True)]
    failed = data.draw(st.sets(st.integers(0, 5)))
    whole = in_order(kind, views, parts, failed)
    whys = {text: ("bad", str(text)) for text in failed}
    equal(whole, replace(encoded(views, kind), failed=whys))
    assert whole.stats == {"texts": 6}


@pytest.mark.ray
@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("kind", KINDS)
def test_encoders_beside_each_other_encode_each_text_once(kind: str) -> None:
    """Three of them, twelve chunks, and texts that two to twelve chunks have."""
    chunks = [
        [f"only {number} has {own}" for own in range(3)]
        + [f"all have {text}" for text in range(2)]
        + [f"two have {number // 2}", f"three have {number // 3}", None]
        for number in range(12)
    ]
    times = Counter(text for texts in chunks for text in texts if text)
    states = [
        state_of(
            f"chunk {number}",
            texts[number % 5 :] + texts[: number % 5],
            [*filter(lambda text: text and times[text] > 1, texts)],
        )
        for number, texts in enumerate(chunks)
    ]
    given_texts, ledger = Given(kind, seconds=0.01), new_ledger()

    def encode(state: ChunkState) -> Encoded:
        return encode_once(
            state, given_texts.encode, ledger, stop=lambda: False, moved=lambda: None
        )

    with ThreadPoolExecutor(3) as encoders:
        made = [*encoders.map(encode, states)]
    for state, one in zip(states, made, strict=True):
        assert state.views is not None
        equal(one, encoded(state.views, kind))
    assert set(given_texts.texts.values()) == {1}
    assert len(given_texts.texts) == len(times)
    assert sum(one.stats["distinct_views"] for one in made) == len(times)


def tried(state: ChunkState, ledger: Any, *, stop: bool = False) -> Counter[str]:
    """The texts that a chunk's encoder is given, by the text."""
    given_texts = Given()
    made = encode_once(state, given_texts.encode, ledger, stop=lambda: stop, moved=lambda: None)
    assert state.views is not None
    equal(made, encoded(state.views, "plain"))
    names = {PLAIN.views([text]).full_ids(0).tobytes(): text for text in ("a fox", "a b c")}
    return Counter(names[one] for one in given_texts.texts.elements())


@pytest.mark.ray
@pytest.mark.usefixtures("joined")
def test_what_the_owner_does_not_give_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps, it ends without, it asks again, its object is lost; a run that stops waits not."""
    monkeypatch.setattr(repeated, "_WAIT_SECONDS", 1.0)
    both = ["a fox", "a b c"]
    one, two, three = (state_of(f"chunk {n}", both, ["a fox"]) for n in range(3))
    fox = [text_hash("a fox")]

    ledger = new_ledger()
    ray.get(ledger.ask_texts.remote(one.chunk.key, fox, insist=False))
    with pytest.raises(InterruptedRunError):
        tried(two, ledger, stop=True)
    assert tried(two, ledger) == {"a fox": 1, "a b c": 1}
    assert tried(three, ledger) == {"a b c": 1}
    # The sleeper wakes, and what it has made comes too late for the others.
    ray.get(ledger.text_made.remote(one.chunk.key, fox, [ray.put(None)]))
    assert tried(state_of("chunk 9", both, ["a fox"]), ledger) == {"a b c": 1}

    ledger = new_ledger()
    ray.get(ledger.ask_texts.remote(one.chunk.key, fox, insist=False))
    ray.get(ledger.abandon.remote(one.chunk.key))
    monkeypatch.setattr(repeated, "_WAIT_SECONDS", 600.0)
    assert tried(two, ledger) == {"a fox": 1, "a b c": 1}
    assert tried(two, ledger) == {"a fox": 1, "a b c": 1}

    @ray.remote(num_cpus=0)
    def held(lost: bool) -> Encoded:
        if lost:
            raise MemoryError("its node is gone")
        return encoded(PLAIN.views(["a fox"]), "plain")

    for lost in (False, True):
        ledger = new_ledger()
        ray.get(ledger.ask_texts.remote(one.chunk.key, fox, insist=False))
        ray.get(ledger.text_made.remote(one.chunk.key, fox, [held.remote(lost)]))
        again = {"a fox": 1} if lost else {}
        assert tried(two, ledger) == {**again, "a b c": 1}
        assert tried(three, ledger) == {"a b c": 1}
