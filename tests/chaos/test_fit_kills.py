"""Drivers that end, or sleep, while they fit or generate: the next run makes nothing again."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedjob.job.resolve import resolve_encoder
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.snapshot import open_snapshot
from embedjob.stages import session
from embedjob.storage.objects import list_files, read_bytes
from embedjob.text.conversations import text_hash
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.drivers import Driver, chance_of, driver, seeds
from tests.encoder.tiny import save_chat
from tests.noted import Note, known_by, notes, noting
from tests.running import Job, Ran, job_file, texts, write_shard

pytestmark = pytest.mark.ray
SHARDS, SHARD_ROWS, SAMPLE = 3, 20, 30
# The engine waits so long before each chunk, so that there is a moment to strike at.
CHUNK_SECONDS = 0.4
Blow = Literal["kill", "suspend"]
Row = tuple[str, int]
Place = Callable[[int], str]


@dataclass(frozen=True)
class Left:
    """What an output has: rows by the output that has them, generations, artefacts, vectors."""

    embedded: dict[str, set[Row]]
    generated: dict[bytes, list[tuple[object, ...]]]
    artefacts: dict[str, bytes]

    @property
    def fits(self) -> set[Row]:
        """The rows that were embedded for a fit."""
        return {row for place, rows in self.embedded.items() if "/fits/" in place for row in rows}


def left_in(out: str) -> Left:
    """What an output holds at this moment, with the outputs of its fits."""
    embedded: dict[str, set[Row]] = {}
    generated: dict[bytes, list[tuple[object, ...]]] = {}
    artefacts: dict[str, bytes] = {}
    for file in list_files(out):
        place, _, name = file.url.rpartition("/")
        if "/data/" in file.url:
            rows = pq.read_table(io.BytesIO(read_bytes(file.url)), columns=["shard", "row"])
            pairs = zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True)
            found = {(Path(shard).stem, row) for shard, row in pairs}
            embedded.setdefault(place.partition("/data/")[0], set()).update(found)
        elif "/generations/" in file.url:
            made = pq.read_table(io.BytesIO(read_bytes(file.url))).to_pydict()
            for of, *variant in zip(*made.values(), strict=True):
                one = generated.setdefault(of, [])
                if tuple(variant) not in one:
                    one.append(tuple(variant))
        elif place.endswith("/artefacts"):
            artefacts[name] = read_bytes(file.url)
    return Left(embedded, generated, artefacts)


@dataclass(frozen=True)
class Bench:
    """A corpus, a model that embeds and generates, and what a run that nobody troubles makes."""

    folder: Path
    chat: Path
    cluster: Cluster
    quiet: Left
    vectors: np.ndarray

    def document(self, out: str) -> Job:
        return _document(self.folder, self.chat, out)


def _bodies() -> dict[Row, str]:
    return {
        (str(shard), row): body
        for shard in range(SHARDS)
        for row, body in enumerate(texts(SHARD_ROWS, seed=shard))
    }


BODIES = _bodies()


def _document(folder: Path, chat: Path, out: str) -> Job:
    """A job that generates, and whitens by a sample of what it embeds."""
    small = {"actors": 1, "cpus_per_actor": 0.1, "gpus_per_actor": 0}
    generate = {
        "kinds": {"shorter": {"instruction": "Say less."}},
        "max_new_tokens": 6,
        "max_prompt_tokens": 200,
        "pool": small,
    }
    steps = [{"whiten": "w"}, {"normalize": True}]
    fit = {"kind": "whiten", "name": "w", "dimensions": 6, "sample": SAMPLE, "seed": 3}
    base = running.job(
        folder / "in",
        out,
        chat,
        generate=generate,
        encoder={"finish": steps},
        # Suspended drivers keep their actors.
        pool=small,
    )
    return {**base, "fit": [fit]}


def vectors(out: str) -> np.ndarray:
    table = open_snapshot(out).to_table(columns=["id", "embedding"])
    assert table["id"].to_pylist() == [f"{shard}-{row}" for shard, row in BODIES]
    return np.stack(table["embedding"].to_pylist())


@pytest.fixture(scope="module")
def bench(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("fit-kills")
    for shard in range(SHARDS):
        write_shard(folder / "in" / f"{shard}.parquet", texts(SHARD_ROWS, seed=shard))
    (folder / "model").mkdir()
    chat, out = save_chat(folder / "model"), str(folder / "quiet")
    ran = _noted_run(_document(folder, chat, out), folder, cluster, folder / "log")
    assert ran.code == 0, ran.err
    quiet = left_in(out)
    _require_once(notes(folder / "log"), _names(chat), Left({}, {}, {}), quiet)
    assert len(quiet.fits) == SAMPLE
    assert quiet.embedded[out] == {*BODIES}
    assert quiet.generated.keys() == {text_hash(body) for body in BODIES.values()}
    return Bench(folder, chat, cluster, quiet, vectors(out))


def _noted_run(document: Job, folder: Path, cluster: Cluster, log: Path, *options: str) -> Ran:
    """`embedjob run` in this process, with engines that note what they are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "recipe_engine", noting(log))
        return running.run(document, folder, "--address", cluster.address, *options)


def _names(chat: Path) -> dict[str, Row]:
    """The rows by what their texts are known by where they are embedded."""
    section = _document(Path("-"), chat, "-")["encoder"]
    recipe = resolve_encoder({**section, "finish": []}, on_gpu=False).recipe
    tokenizer = load_tokenizer(recipe)
    names = {known_by(tokenizer.views([body]).full_ids(0)): row for row, body in BODIES.items()}
    assert len(names) == len(BODIES)
    return names


def _require_once(found: list[Note], names: dict[str, Row], before: Left, after: Left) -> None:
    """A run was given nothing that was committed before it, and nothing twice."""
    made = [text for note in found if note.what == "generated" for text in note.texts]
    assert len(made) == len({*made})
    assert not {text_hash(text) for text in made} & before.generated.keys()
    places = {note.place for note in found if note.what == "embedded"}
    assert places <= after.embedded.keys()
    for place in places:
        own = [note for note in found if (note.what, note.place) == ("embedded", place)]
        # Probes are no rows.
        rows = [names[text] for note in own for text in note.texts if text in names]
        committed = before.embedded.get(place, set())
        assert not {*rows} & committed, f"embedded again: {sorted({*rows} & committed)}"
        assert len(rows) == len({*rows})


# What is there when the driver is struck, and how many of it at most.
MOMENTS: tuple[tuple[str, int], ...] = (
    ("fits/generations", 2),
    ("fits/data", 2),
    ("generations", 3),
    ("artefacts", 1),
    ("data", 3),
    ("artefacts/made", 1),
)


def _is_there(out: str, what: str, number: int) -> bool:
    fits, _, folder = what.rpartition("/")
    found = list_files(f"{out}/{fits}" if fits == "fits" else f"{out}/{what}")
    return sum(fits != "fits" or f"/{folder}/" in file.url for file in found) >= number


@contextmanager
def _struck(bench: Bench, folder: Path, out: str, *, seed: int, blow: Blow) -> Iterator[Driver]:
    """A run that is killed, or suspended, once something is there."""
    chance = chance_of(seed, "fits")
    what, most = MOMENTS[(seed + seed // 4) % len(MOMENTS)]
    number = chance.randint(1, most)
    job = str(job_file(bench.document(out), folder))
    command = (str(folder / "first-log"), str(CHUNK_SECONDS), "run", job, "--json")
    address = ("--address", bench.cluster.address)
    with driver(folder, *command, *address, module="tests.noted") as victim:
        victim.until(lambda: _is_there(out, what, number), f"{number} of {what}")
        time.sleep(chance.uniform(0.0, CHUNK_SECONDS))
        if blow == "suspend":
            victim.suspend()
        else:
            victim.kill()
        yield victim


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", seeds(slow=0))
def test_a_run_that_is_struck_while_it_fits_or_generates_makes_nothing_twice(
    seed: int, bench: Bench, place: Place, tmp_path: Path, say: Callable[[str], None]
) -> None:
    blow: Blow = "suspend" if seed % 4 >= 2 else "kill"
    out = place(seed)
    document = bench.document(out)
    with _struck(bench, tmp_path, out, seed=seed, blow=blow) as victim, ExitStack() as stack:
        if blow == "suspend":
            waker = threading.Timer(chance_of(seed, "wakes").uniform(0.0, 8.0), victim.wake)
            waker.start()
            stack.callback(waker.join)
        before = left_in(out)
        ran = _noted_run(document, tmp_path, bench.cluster, tmp_path / "log", "--takeover")
        assert ran.code == 0, ran.err
        stack.close()
        if blow == "suspend":
            code = victim.process.wait(60)
            assert code in (0, 1), victim.said()
            assert "Traceback" not in victim.said(), victim.said()
    after, names = left_in(out), _names(bench.chat)
    _require_once(notes(tmp_path / "log"), names, before, after)
    assert after.artefacts == bench.quiet.artefacts
    assert after.generated == bench.quiet.generated
    assert np.array_equal(vectors(out), bench.vectors)
    assert after.embedded[out] == {*BODIES}
    assert running.command("verify", out, "--json").summary["problems"] == []
    say(f"seed {seed}: {blow} {out[:2]}, {len(before.fits)} rows of the fit were there")
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err
