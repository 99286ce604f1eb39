"""A world whose jobs are real but for Ray, the time and what a generator says.

They are planned, fitted, read, tokenized, encoded and written by the project's own functions. With
a table of words as their model, no torch is needed.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from embedjob.config.job_file import JobSource, Layer
from embedjob.input.chunks import Chunk
from embedjob.input.reading import read_chunk
from embedjob.job.generation_plan import generation_files, taken_over
from embedjob.job.options import Options
from embedjob.job.output import claim_of, output_spec
from embedjob.job.planning import JobPlan, plan_job
from embedjob.job.result import Outcome, Outcomes, StagesEnd
from embedjob.output import lease
from embedjob.output.claim import put_claim
from embedjob.output.derived.generations import GenerationFiles
from embedjob.output.file_names import data_directory, parse_name
from embedjob.output.snapshot import newest_snapshot
from embedjob.stages.chunk_state import ChunkState
from embedjob.stages.engine import RecipeEngine, recipe_engine
from embedjob.stages.fits import fit, term_counts, word_counts
from embedjob.stages.fits import reduce as reducing
from embedjob.stages.language.generate import SeenTexts, standing
from embedjob.stages.tokenize import VARIANTS, tokenize_rows
from embedjob.stages.write import Committer, outcome_of
from embedjob.storage import objects
from embedjob.text.conversations import Variant, embedded_texts, text_hash
from tests.output.worlds import World

WORDS = [f"w{number:02}" for number in range(40)]
Good = dict[tuple[str, str], list[str]]


def write_table(path: Path) -> Path:
    """A GloVe file of WORDS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = np.random.default_rng(7).normal(size=(len(WORDS), 6))
    rows = zip(WORDS, vectors.tolist(), strict=True)
    path.write_text("".join(f"{word} {' '.join(map(str, row))}\n" for word, row in rows))
    return path


class JobWorld(World):
    """A world of one job, whose sections are given: its encoder, and what else it has.

    `embedded` has each chunk, and `generated` each text, as often as an engine was given it.
    """

    def __init__(
        self, folder: Path, sections: Mapping[str, Any], *, inputs: Path, out: str | None = None
    ) -> None:
        super().__init__(folder, out)
        self.sections, self.inputs = dict(sections), inputs
        self.embedded: list[str] = []
        self.generated: list[str] = []

    @contextmanager
    def running(self) -> Iterator["World"]:
        with super().running(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "connected", lambda address: nullcontext())
            patch.setattr(reducing, "_merged", _merged_here)
            for module in (term_counts, word_counts):
                patch.setattr(module, "memory_of", lambda chunks: 0)
            for module in (fit, term_counts, word_counts):
                patch.setattr(module, "ray", _RayHere)
            yield self

    def write(self, name: str, rows: int, version: int) -> None:
        """A shard of different texts, whose third row is bad."""
        path = self.inputs / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [None if row == 2 else _text(f"{name} {version} {row}") for row in range(rows)]
        columns = {"t": pa.array(texts, pa.string()), "n": [f"{version}-{r}" for r in range(rows)]}
        pq.write_table(pa.table(columns), path, row_group_size=5)
        [file] = objects.find(str(path))
        self.good[file.url, file.etag] = [n for n, t in zip(columns["n"], texts, strict=True) if t]

    def _planned(self, _: JobSource, *, refit: bool = False, **__: bool) -> JobPlan:
        me = self.active
        assert me is not None
        document = {
            "input": {"path": str(self.inputs / me.input), "text": "t", "id": "n"},
            "pool": {"actors": 1},
            "output": {"path": self.out, "chunk_rows": 10},
            "run": {"max_quarantined": 1.0},
            **self.sections,
        }
        plan = plan_job(JobSource((Layer("job.yaml", document),)), refit=refit)
        me.shards = plan.shards
        return plan

    def _stages(
        self, plan: JobPlan, *_: Any, holder: lease.Holder, options: Options, **__: Any
    ) -> StagesEnd:
        if not plan.left:
            return StagesEnd()
        put_claim(plan.job.out, claim_of(plan), new_fingerprint=options.new_fingerprint)
        dtype = plan.job.config.encoder.vector_dtype
        committer = Committer(holder.lease, output_spec(plan), dtype)
        seen = SeenTexts(100)
        ends = [self._embedded(plan, chunk, committer, seen) for chunk in plan.left]
        holder.require()
        return StagesEnd(Outcomes(ends))

    def _embedded(
        self, plan: JobPlan, chunk: Chunk, committer: Committer, seen: SeenTexts
    ) -> Outcome:
        with self.unnoticed():
            here = objects.list_files(data_directory(plan.job.out, plan.job.fingerprint))
            done = {parse_name(file.name).chunk for file in here}
        if self._is_alone:
            assert chunk.name not in done, f"{chunk.name} is embedded again"
        self.embedded.append(chunk.name)
        engine = recipe_engine(plan.job.config, 1)
        assert isinstance(engine, RecipeEngine)
        tokenizer, encoder = _loaded(engine)
        rows = read_chunk(chunk, plan.job.config.input)
        count = len(rows)
        files = generation_files(plan.job)
        if files is not None:
            files = GenerationFiles(
                files.out,
                files.fingerprint,
                files.projection,
                taken_over(files, plan.generated_in, [chunk]),
            )
            rows = self._with_variants(plan, chunk, rows, files, seen)
        rows, views = tokenize_rows(rows, tokenizer, engine.long_text)
        encoded = encoder.encode_views(views, stop=lambda: False, on_progress=lambda *_: None)
        end = outcome_of(ChunkState(chunk, rows, encoded=encoded, stats={"rows": count}), committer)
        assert end is not None
        assert end.fault is None, end.fault
        return end

    def _with_variants(
        self, plan: JobPlan, chunk: Chunk, rows: pa.Table, files: GenerationFiles, seen: SeenTexts
    ) -> pa.Table:
        section = plan.job.config.encoder.generate
        assert section is not None
        pairs = [(kind, number) for kind in section.kinds for number in range(section.count)]

        def ask(texts: Sequence[str], _: int) -> dict[str, Sequence[Variant]]:
            with self.unnoticed():
                put = self.generations(files.fingerprint[:12])
            if self._is_alone:
                assert not [text for text in texts if text_hash(text) in put], "generated again"
            self.generated += [text for text in texts if text.strip()]
            return {
                text: [Variant(*pair, _said(text, *pair), 3) for pair in pairs] for text in texts
            }

        coded = pc.dictionary_encode(rows["text"].combine_chunks())
        texts = coded.dictionary.to_pylist()
        stands = standing(chunk, texts, files, seen, ask)
        assert stands is not None
        own = [embedded_texts(text, one) for text, one in zip(texts, stands[0], strict=True)]
        column = pa.array(own, pa.large_list(pa.large_string())).take(coded.indices)
        return rows.append_column(VARIANTS, column)

    @property
    def _is_alone(self) -> bool:
        """Whether the active run holds the output: one that slept and lost it may go on a while."""
        assert self.active is not None
        return not self.active.woken.is_set()

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """What a test looks at is no moment of an operation."""
        me, self.active = self.active, None
        yield
        self.active = me

    def generations(self, generator: str = "") -> dict[bytes, list[tuple[Any, ...]]]:
        """What was made of each text, by all files of the output and of its fits."""
        made: dict[bytes, dict[tuple[Any, ...], None]] = {}
        for file in objects.list_files(self.out):
            if f"/generations/{generator}" in file.url:
                table = pq.read_table(pa.BufferReader(objects.read_bytes(file.url)))
                for of, *variant in zip(*table.to_pydict().values(), strict=True):
                    made.setdefault(of, {})[tuple(variant)] = None
        return {of: [*variants] for of, variants in made.items()}

    def artefacts(self) -> dict[str, bytes]:
        """The content of each artefact, by its file's name."""
        files = objects.list_files(f"{self.out}/artefacts")
        mine = (file for file in files if "/made/" not in file.url)
        return {file.name: objects.read_bytes(file.url) for file in mine}

    def vectors(self) -> dict[tuple[str, int], tuple[Any, ...]]:
        """What a reader of the newest snapshot sees of each row."""
        snapshot = newest_snapshot(self.out)
        assert snapshot is not None
        found: dict[tuple[str, int], tuple[Any, ...]] = {}
        for file in snapshot.files:
            table = pq.read_table(pa.BufferReader(objects.read_bytes(f"{self.out}/{file.path}")))
            beside = [name for name in table.column_names if name.startswith("sparse")]
            for row in table.select(["shard", "row", "embedding", *beside]).to_pylist():
                found[row.pop("shard"), row.pop("row")] = tuple(map(str, row.values()))
        return found


def _text(seed: str) -> str:
    chance = random.Random(seed)
    return " ".join(chance.sample(WORDS, 4))


def _said(text: str, kind: str, number: int) -> str:
    """What stands for an answer: words of the table, which the text, kind and number decide."""
    return _text(f"{text} {kind} {number}")


def _merged_here(step: Any, groups: Any, state_of: Any) -> Any:
    return reduce(step.merge, [state_of(step, group) for group in groups])


@lru_cache(maxsize=4)
def _loaded(engine: RecipeEngine) -> tuple[Any, Any]:
    return engine.load_tokenizer(), engine.load_encoder()


class _Task:
    def __init__(self, work: Any) -> None:
        self._work = work

    def options(self, **_: Any) -> "_Task":
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._work(*arguments)


class _RayHere:
    """Ray's tasks, done at once in this process."""

    remote = _Task

    @staticmethod
    def put(value: Any) -> Any:
        return value

    @staticmethod
    def get(value: Any) -> Any:
        return value

    @staticmethod
    def wait(values: Any, **_: Any) -> None:
        return
