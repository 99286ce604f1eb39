"""Repeated texts: what several chunks have, and no old file, is encoded for one of them.

The chunk that comes first encodes them and leaves their embeddings in Ray's store; the others take
them from there. A chunk waits for none that is not in an encoder's hands by then, and not for long:
what the first one does not give in time, or what was lost, is encoded again.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import RayError

from embedjob.errors import InterruptedRunError
from embedjob.stages.chunk_state import ChunkState
from embedjob.text.arrays import Ints, gather, offsets_of
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded, Lines
from embedjob.vectors.sparse import sparse

# What another chunk's encoder may take, which has them in hand already.
_WAIT_SECONDS, _POLL_SECONDS = 60.0, 0.2
# An object in Ray's store, and the place of a text in it.
PlaceInStore = tuple[Any, int]
Answer = PlaceInStore | Literal["encode", "wait"]


class TextOwners:
    """Which chunk encodes each repeated text, and where the embedding is once it is made."""

    def __init__(self) -> None:
        """Start without a text."""
        self._owners: dict[bytes, str] = {}
        self._made: dict[bytes, PlaceInStore] = {}
        self._owned: dict[str, set[bytes]] = defaultdict(set)

    def ask(self, key: str, hashes: Sequence[bytes], *, insist: bool = False) -> list[Answer]:
        """Return what a chunk is to do about each text: to take it, encode it, or wait for it.

        The first chunk that asks for a text is its owner, and encodes it; asking again, it does so
        again, as its process has died. Whoever insists becomes the owner.
        """
        answers: list[Answer] = []
        for one in hashes:
            if insist or self._owners.setdefault(one, key) == key:
                self._owners[one] = key
                self._owned[key].add(one)
                self._made.pop(one, None)
                answers.append("encode")
            else:
                answers.append(self._made.get(one, "wait"))
        return answers

    def made(self, key: str, hashes: Sequence[bytes], holder: Sequence[Any]) -> None:
        """Note that the one object of `holder` has the embeddings of these texts, in order."""
        for place, one in enumerate(hashes):
            if self._owners.get(one) == key:
                self._made[one] = (holder[0], place)

    def released(self, key: str) -> None:
        """Note that a chunk has ended, or was put down: others encode what it has not made."""
        for one in self._owned.pop(key, ()):
            if self._owners.get(one) == key and one not in self._made:
                del self._owners[one]


def encode_once(
    state: ChunkState,
    encode: Callable[[TokenViews], Encoded],
    ledger: Any,
    *,
    stop: Callable[[], bool],
    moved: Callable[[], None],
) -> Encoded:
    """Encode the texts of a chunk, and take the repeated ones from the chunks that encoded them.

    A chunk leaves what it owns before it waits, so that no two chunks wait for each other.

    Args:
        state: the chunk with its views.
        encode: encodes views.
        ledger: the run's ledger.
        stop: whether the run is stopping: InterruptedRunError where others are still waited for.
        moved: called while others are waited for.
    """
    key, views = state.chunk.key, state.views
    assert views is not None
    waiting = _repeated_in(state)
    if not waiting:
        return encode(views)
    plain = np.setdiff1d(np.arange(views.texts), [*waiting.values()])
    places: list[Ints] = []
    parts: list[Encoded] = []
    since = time.monotonic()
    while True:
        late = time.monotonic() - since > _WAIT_SECONDS
        answers = _ask(ledger, key, [*waiting], insist=late)
        own = [one for one, answer in answers.items() if answer == "encode"]
        chosen = np.append(plain, [waiting.pop(one) for one in own]).astype(np.int64)
        if len(chosen):
            places.append(chosen)
            parts.append(encode(views.take(chosen)))
            _leave(own, _taken(parts[-1], np.arange(len(plain), len(chosen))), ledger, key)
            plain, since = plain[:0], time.monotonic()
        for some, encoded in _fetched(answers):
            if encoded is None:
                _ask(ledger, key, some, insist=True)
            else:
                places.append(np.array([waiting.pop(one) for one in some], np.int64))
                parts.append(encoded)
        if not waiting:
            return _in_order(parts, places)
        if stop():
            raise InterruptedRunError("the run is stopping")
        moved()
        time.sleep(_POLL_SECONDS)


def _repeated_in(state: ChunkState) -> dict[bytes, int]:
    """Return the place, among the chunk's texts, of each repeated text that is to be encoded."""
    if not state.repeated or state.rows is None:
        return {}
    rows = state.rows.select(["text_hash", "unique"])
    rows = rows.filter(rows["unique"].is_valid())
    places = dict(zip(rows["text_hash"].to_pylist(), rows["unique"].to_pylist(), strict=True))
    hashes = (state.repeated[start : start + 16] for start in range(0, len(state.repeated), 16))
    return {one: places[one] for one in hashes if one in places}


def _ask(ledger: Any, key: str, hashes: Sequence[bytes], *, insist: bool) -> Mapping[bytes, Answer]:
    answers = ray.get(ledger.ask_texts.remote(key, hashes, insist=insist))
    return dict(zip(hashes, answers, strict=True))


def _leave(hashes: Sequence[bytes], encoded: Encoded, ledger: Any, key: str) -> None:
    """Leave what a chunk owns, if anything, in Ray's store for the others."""
    if hashes:
        ray.get(ledger.text_made.remote(key, hashes, [ray.put(encoded)]))


def _fetched(
    answers: Mapping[bytes, Answer],
) -> Iterator[tuple[list[bytes], Encoded | None]]:
    """Yield the texts that one object has, encoded; None where it was lost."""
    held: dict[Any, list[tuple[bytes, int]]] = defaultdict(list)
    for one, answer in answers.items():
        if not isinstance(answer, str):
            held[answer[0]].append((one, answer[1]))
    for holder, some in held.items():
        hashes = [one for one, _ in some]
        try:
            every: Encoded = ray.get(holder, timeout=_WAIT_SECONDS)
        except RayError:
            yield hashes, None
        else:
            yield hashes, _taken(every, np.array([place for _, place in some], np.int64))


def _taken(encoded: Encoded, texts: Ints) -> Encoded:
    """Return these texts in this order, without the statistics, which count all texts."""
    rows, offsets = gather(encoded.line_offsets, texts)
    lines = encoded.lines
    if lines is not None:
        lines = Lines(offsets, None if lines.chars is None else lines.chars[rows])
    failed = encoded.failed
    return Encoded(
        encoded.embeddings[rows],
        {new: failed[old] for new, old in enumerate(texts.tolist()) if old in failed},
        sparse=None if encoded.sparse is None else encoded.sparse.take(texts),
        routers=None if encoded.routers is None else encoded.routers[texts],
        lines=lines,
    )


def _in_order(parts: Sequence[Encoded], places: Sequence[Ints]) -> Encoded:
    """Return the texts of several parts by their places in all, and the sums of statistics."""
    stats: Counter[str] = Counter()
    for part in parts:
        stats.update(part.stats)
    whole = _taken(_joined(parts), np.argsort(np.concatenate(places)))
    return replace(whole, stats=stats)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """Return the texts of several parts, one part after the other."""
    failed: dict[int, tuple[str, str]] = {}
    texts = 0
    for part in parts:
        failed |= {texts + text: why for text, why in part.failed.items()}
        texts += len(part.line_offsets) - 1
    lined = [part.lines for part in parts if part.lines is not None]
    chars = [lines.chars for lines in lined if lines.chars is not None]
    rows = [part.sparse for part in parts if part.sparse is not None]
    routers = [part.routers for part in parts if part.routers is not None]
    lines = None
    if lined:
        offsets = offsets_of(np.concatenate([one.counts for one in lined]))
        lines = Lines(offsets, np.concatenate(chars) if chars else None)
    return Encoded(
        np.concatenate([part.embeddings for part in parts]),
        failed,
        sparse=sparse([one.row(row) for one in rows for row in range(len(one))]) if rows else None,
        routers=np.concatenate(routers) if routers else None,
        lines=lines,
    )
