"""GENERATE on a real cluster: made once, put before it is embedded, read wherever it was put.

Covers: embedjob.config.generation
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedjob.encoder.encoder import Encoder
from embedjob.errors import RefusedError
from embedjob.input.chunks import Chunk, Shard
from embedjob.job.options import Options
from embedjob.job.result import Result
from embedjob.output.derived.generations import GenerationFiles
from embedjob.stages.language.generate import SeenTexts, counts, standing
from embedjob.storage.objects import list_files
from embedjob.text.conversations import Variant, embedded_texts, text_hash
from tests import running
from tests.cluster import Cluster
from tests.encoder.tiny import save_chat
from tests.engines import generating, texts_generated, unloadable
from tests.outputs import published, written
from tests.running import Job, write_shard

pytestmark = pytest.mark.ray
GENERATE: Job = {
    "kinds": {
        "shorter": {
            "instruction": "Say less.",
            "demonstrations": [{"text": f"What is {n}?", "answer": f"{n}."} for n in range(3)],
        },
        "longer": {"instruction": "Say more."},
    },
    "count": 2,
    "shots": 2,
    "max_new_tokens": 6,
    "max_prompt_tokens": 400,
}
EACH = 4


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat-model"))


@dataclass(frozen=True)
class Corpus:
    """An input of two chunks with a text that is there twice, a blank one and none."""

    folder: Path
    document: Job
    log: Path

    @property
    def out(self) -> Path:
        return Path(self.document["output"]["path"])

    @property
    def texts(self) -> list[str]:
        """The texts of both chunks, those that are equal in a chunk once."""
        bodies = pq.read_table(self.folder / "in")["body"].to_pylist()
        halves = (bodies[:10], bodies[10:])
        return [text for half in halves for text in dict.fromkeys(half) if text is not None]

    def to(self, out: str, **sections: Job) -> Job:
        changed = {"output": {"path": str(self.folder / out), "chunk_rows": 10}, **sections}
        return {
            **self.document,
            **{k: {**self.document.get(k, {}), **v} for k, v in changed.items()},
        }


def corpus_in(folder: Path, chat: Path) -> Corpus:
    bodies: list[str | None] = [*running.texts(20)]
    bodies[3], bodies[5], bodies[7] = None, bodies[4], "  "
    write_shard(folder / "in" / "a.parquet", bodies)
    document = running.job(
        folder / "in", folder / "out", chat, generate=GENERATE, run={"max_quarantined": 0.1}
    )
    return Corpus(folder, document, folder / "log")


@dataclass(frozen=True)
class Ran:
    """A corpus, the result of its first run, its vectors, and what the run said on stderr."""

    corpus: Corpus
    result: Result
    vectors: np.ndarray
    said: str


@pytest.fixture(scope="module")
def ran(cluster: Cluster, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    corpus = corpus_in(tmp_path_factory.mktemp("generated"), chat)
    options = Options(address=cluster.address)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        result = running.run_with(corpus.document, options, generating(corpus.log))
    return Ran(corpus, result, vectors(corpus.out), said.getvalue())


def generations(out: Path) -> dict[bytes, list[Variant]]:
    """What the files of an output hold, by text."""
    made: dict[bytes, list[Variant]] = {}
    for file in list_files(str(out / "generations")):
        for of, *variant in zip(*pq.read_table(file.url).to_pydict().values(), strict=True):
            made.setdefault(of, []).append(Variant(*variant))
    return made


def vectors(out: Path) -> np.ndarray:
    return np.stack(published(out)["embedding"].to_pylist())


def test_each_text_is_embedded_with_what_was_made_of_it(ran: Ran) -> None:
    corpus, result = ran.corpus, ran.result
    assert result.faults == ()
    bodies = [text for text in pq.read_table(corpus.folder / "in")["body"].to_pylist() if text]
    made = generations(corpus.out)
    own = [embedded_texts(text, made.get(text_hash(text), [])) for text in bodies]
    assert [len(texts) for texts in own] == [EACH if text.strip() else 0 for text in bodies]
    section = {**corpus.document["encoder"], "finish": []}
    plain = Encoder.from_config(section, device="cpu")
    means = np.stack([plain.encode([a, *b]).mean(axis=0) for a, b in zip(bodies, own, strict=True)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(ran.vectors - means).max() <= 1e-5


def test_queries_are_embedded_as_the_corpus_is(ran: Ran) -> None:
    corpus = ran.corpus
    table = published(corpus.out)
    bodies = [text for text in pq.read_table(corpus.folder / "in")["body"].to_pylist() if text]
    encoder = Encoder.from_output(str(corpus.out), device="cpu")
    assert np.abs(encoder.encode(bodies[:6]) - ran.vectors[:6]).max() <= 1e-5
    assert len(table) == len(bodies)


def test_every_text_of_a_chunk_is_made_once_and_counted(ran: Ran) -> None:
    corpus, result = ran.corpus, ran.result
    assert sorted(texts_generated(corpus.log)) == sorted(corpus.texts)
    summary = result.summary
    made = [one for variants in generations(corpus.out).values() for one in variants]
    assert summary.generated == sum(one.text is not None for one in made)
    asked = [text for text in corpus.texts if text.strip()]
    assert summary.generated + summary.generation_fallbacks == EACH * len(asked)
    assert summary.generated_tokens == sum(one.tokens for one in made)
    assert summary.generation_fallbacks == sum(one.text is None for one in made)
    assert summary.generations_reused == 0
    assert f"to generate: at most {EACH * 20} texts of {EACH * 20 * 6} tokens" in ran.said
    kept = json.loads((corpus.out / "runs" / "00000001.json").read_text())
    assert kept["generated"] == summary.generated


@pytest.mark.slow
def test_another_method_with_the_same_generator_makes_nothing_anew(
    cluster: Cluster, ran: Ran
) -> None:
    corpus, first = ran.corpus, ran.result
    document = corpus.to("out", encoder={"templates": ["{text} means"]})
    options = Options(address=cluster.address, new_fingerprint=True)
    log = corpus.folder / "other-log"
    result = running.run_with(document, options, generating(log))
    assert texts_generated(log) == []
    assert result.summary.fingerprint != first.summary.fingerprint
    assert result.summary.generations_reused == first.summary.generated
    assert result.summary.generation_fallbacks == first.summary.generation_fallbacks
    assert (result.summary.generated, result.summary.generated_tokens) == (0, 0)


@pytest.mark.slow
def test_a_process_that_ends_while_it_generates_leaves_nothing_half_made(
    cluster: Cluster, ran: Ran, chat: Path, tmp_path: Path
) -> None:
    """The same generations and the same vectors, and no chunk that was put is made again."""
    corpus = ran.corpus
    again = corpus_in(tmp_path, chat)
    (tmp_path / "ends").touch()
    result = running.run_with(
        again.document, Options(address=cluster.address), generating(again.log)
    )
    assert result.faults == ()
    assert not (tmp_path / "ends").exists()
    assert generations(again.out) == generations(corpus.out)
    assert np.array_equal(vectors(again.out), ran.vectors)
    given = texts_generated(again.log)
    # The chunk that was in hand was not put, and is made once more.
    assert len(again.texts) < len(given) <= len(again.texts) + 10


@pytest.mark.slow
def test_a_run_after_the_loss_of_all_vectors_makes_no_text_again(
    cluster: Cluster, ran: Ran, tmp_path: Path
) -> None:
    corpus = ran.corpus
    document = corpus.to("resumed")
    resumed = Path(document["output"]["path"])
    for file in list_files(str(corpus.out / "generations")):
        name = file.url.removeprefix(str(corpus.out) + "/")
        (resumed / name).parent.mkdir(parents=True, exist_ok=True)
        (resumed / name).write_bytes(Path(file.url).read_bytes())
    log = tmp_path / "log"
    result = running.run_with(document, Options(address=cluster.address), generating(log))
    assert texts_generated(log) == []
    assert result.summary.generated == 0
    assert np.array_equal(vectors(resumed), ran.vectors)


@pytest.mark.slow
def test_a_generator_that_does_not_load_stops_the_run_with_its_reason(
    cluster: Cluster, ran: Ran, chat: Path
) -> None:
    corpus = ran.corpus
    document = corpus.to("refused", generate={"seed": 1})
    with pytest.raises(RefusedError, match=r"the generator did not load: .* no such weights"):
        running.run_with(document, Options(address=cluster.address), unloadable)
    assert written(document["output"]["path"]) == {}


def test_what_is_known_of_texts_is_not_asked_again(tmp_path: Path) -> None:
    """Of the chunk's file, of another output, or of a chunk before: the file has all of it."""
    chunk = Chunk(Shard("/in/a.parquet", 10, "etag"), 0, 3, (0, 1), 0, "name.parquet", 30, 100)
    later = Chunk(Shard("/in/b.parquet", 10, "etag"), 0, 3, (0, 1), 0, "name.parquet", 30, 100)
    sample = GenerationFiles(str(tmp_path / "sample"), "f" * 64, "text")
    sample.put(chunk, ["a"], [answer("a")])
    others = {sample.name(chunk): [sample.url(chunk)]}
    files = GenerationFiles(str(tmp_path / "out"), "f" * 64, "text", others)
    asked: list[tuple[list[str], int]] = []

    def ask(texts: Sequence[str], known: int) -> dict[str, Sequence[Variant]]:
        asked.append(([*texts], known))
        return {text: answer(text) for text in texts}

    seen = SeenTexts(10)
    stands = standing(chunk, ["a", "b", " "], files, seen, ask)
    assert asked == [(["b", " "], 1)]
    assert stands is not None
    made, fresh = stands
    assert [tuple(one) for one in made] == [answer("a"), answer("b"), answer(" ")]
    assert counts(["a", "b", " "], made, fresh) == {
        "generated": 1,
        "generated_tokens": 2,
        "generations_reused": 1,
        "generation_fallbacks": 0,
    }
    # The same text in another chunk, and one that is new.
    stands = standing(later, ["b", "c"], files, seen, ask)
    assert asked[1:] == [(["c"], 1)]
    assert [tuple(one) for one in files.read(later, ["b", "c"]) or ()] == [answer("b"), answer("c")]
    # Nobody answers: nothing is put.
    third = Chunk(Shard("/in/c.parquet", 10, "etag"), 0, 3, (0, 1), 0, "name.parquet", 30, 100)
    assert standing(third, ["d"], files, seen, lambda *_: None) is None
    assert not files.is_put(third)
    # What stands is read, and nobody asked.
    assert standing(chunk, ["a", "b", " "], files, SeenTexts(10), ask) is not None
    assert len(asked) == 2


def answer(text: str) -> tuple[Variant, ...]:
    return (Variant("shorter", 0, f"{text}!", 2),) if text.strip() else ()


def test_an_actor_forgets_the_texts_that_it_met_first() -> None:
    seen = SeenTexts(2)
    seen.add(["a", "b"], [answer("a"), answer("b")])
    seen.add(["a"], [answer("a")])
    seen.add(["c"], [answer("c")])
    known = seen.of(["a", "b", "c"])
    assert known == {text_hash(text): answer(text) for text in "ac"}
