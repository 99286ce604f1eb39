"""GENERATE by vLLM: all questions of a run go through Ray's own vLLM processor, before the flow.

vLLM schedules its requests over all chunks at once. What it answers is put chunk by chunk, as soon
as the last answer of a chunk is there; the flow then finds the files, and asks nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from embedjob.config.generation import Generation
from embedjob.config.job import ActorRange, Pool
from embedjob.config.recipe import Recipe
from embedjob.input.chunks import Chunk
from embedjob.models.questions import Question, Questioner, load_questioner
from embedjob.output.derived.generations import GenerationFiles
from embedjob.stages.read import ReadRows
from embedjob.text.conversations import Variant, cleaned, text_hash

# From a dataset of requests to the same with the columns of answers and errors.
Processor = Callable[[ray.data.Dataset], ray.data.Dataset]
REQUESTS = pa.schema(
    [
        ("number", pa.int64()),
        ("expected", pa.int64()),
        ("text", pa.large_string()),
        ("kind", pa.string()),
        ("index", pa.int64()),
        ("tokenized_prompt", pa.list_(pa.int64())),
        ("seed", pa.int64()),
    ]
)
# As Ray's processor names what an engine gives back.
ANSWER, ERROR = "generated_tokens", "__inference_error__"
# Requests that are handed to an engine together: it takes as many of them as it has memory for.
_SEQUENCES = 256
_BLOCK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class VllmPass:
    """What the tasks of the pass need: the recipe as JSON, and where generations lie."""

    recipe_json: str
    files: GenerationFiles

    def __hash__(self) -> int:
        """Equal for equal values, so that a process loads its tokenizer once."""
        return hash((self.recipe_json, self.files.fingerprint))


def generate_with_vllm(
    chunks: Sequence[Chunk],
    rows_of: ReadRows,
    vllm_pass: VllmPass,
    processor: Processor,
    *,
    ledger: Any,
) -> None:
    """Put the generations of every chunk that has none yet.

    A chunk that cannot be read has none after it: the flow reads it again, and says why.

    Args:
        chunks: those that the run has left.
        rows_of: reads the chunks of one pass.
        vllm_pass: the recipe, and where generations lie.
        processor: answers requests, as `vllm_processor` builds it.
        ledger: the run's ledger.
    """
    lacking = [chunk for chunk in chunks if not vllm_pass.files.is_put(chunk)]
    if not lacking:
        return
    context = DataContext.get_current().copy()
    # Of requests many are a block, unlike the chunks of the flow.
    context.target_max_block_size = _BLOCK_BYTES
    with DataContext.current(context):
        numbers = ray.data.from_items(
            [{"number": number} for number in range(len(lacking))],
            override_num_blocks=len(lacking),
        )
        asked = numbers.map_batches(
            MakeRequests(lacking, rows_of, vllm_pass), batch_size=1, batch_format="pyarrow"
        )
        ended = processor(asked).map_batches(
            PutAnswers,
            fn_constructor_args=(lacking, vllm_pass, ledger),
            batch_format="pyarrow",
            # A single actor: the answers of one chunk come in any order, from any engine.
            compute=ActorPoolStrategy(size=1),
            num_cpus=0.25,
        )
        for _ in ended.iter_rows():
            pass


@dataclass(frozen=True)
class MakeRequests:
    """Turns chunks into requests: the question's ids, how it is sampled, and whose it is."""

    chunks: Sequence[Chunk]
    rows_of: ReadRows
    vllm_pass: VllmPass

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a row for each question about the texts of the chunks of these numbers."""
        rows = [row for number in block["number"].to_pylist() for row in self._rows(number)]
        return pa.Table.from_pylist(rows, schema=REQUESTS)

    def _rows(self, number: int) -> Iterator[dict[str, Any]]:
        try:
            [rows] = self.rows_of([self.chunks[number]])
        except Exception:  # the flow reads it again, and reports it
            return
        known = self.vllm_pass.files.known(self.chunks[number])
        distinct = dict.fromkeys(rows["text"].drop_null().to_pylist())
        texts = [text for text in distinct if text_hash(text) not in known]
        questions = _questioner(self.vllm_pass).transformations(texts)
        if not questions:
            # Nobody would answer, and nothing would be put.
            self.vllm_pass.files.put_by_hash(self.chunks[number], known)
        for question in questions:
            yield {
                "number": number,
                "expected": len(questions),
                "text": texts[question.about],
                "kind": question.kind,
                "index": question.number,
                "tokenized_prompt": question.ids,
                "seed": seed_of(question),
            }


class PutAnswers:
    """Collects answers, and puts those of a chunk when the last of them is there."""

    def __init__(self, chunks: Sequence[Chunk], vllm_pass: VllmPass, ledger: Any) -> None:
        """Take what `generate_with_vllm` takes."""
        self._chunks, self._pass, self._ledger = chunks, vllm_pass, ledger
        self._answers: dict[int, list[tuple[str, Variant]]] = defaultdict(list)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Take these answers; return the numbers of the chunks that were put."""
        self._ledger.present.remote()
        self._ledger.moved.remote()
        put = []
        for row in block.to_pylist():
            mine = self._answers[row["number"]]
            mine.append((row["text"], self._variant(row)))
            if len(mine) == row["expected"]:
                self._put(row["number"], self._answers.pop(row["number"]))
                put.append(row["number"])
        return pa.table({"put": pa.array(put, pa.int64())})

    def _variant(self, row: Mapping[str, Any]) -> Variant:
        answer = [] if row.get(ERROR) else list(row.get(ANSWER) or ())
        stops = set(_generation(self._pass).stop_ids or ())
        kept = [token for token in answer if token not in stops]
        text = cleaned(_questioner(self._pass).decode(kept))
        return Variant(row["kind"], row["index"], text, len(kept))

    def _put(self, number: int, answers: Sequence[tuple[str, Variant]]) -> None:
        kinds = list(_generation(self._pass).kinds)
        made: dict[str, list[Variant]] = defaultdict(list)
        for text, variant in sorted(
            answers, key=lambda one: (kinds.index(one[1].kind), one[1].number)
        ):
            made[text].append(variant)
        files, chunk = self._pass.files, self._chunks[number]
        tokens = sum(variant.tokens for _, variant in answers)
        self._ledger.answered.remote(chunk.key, len(answers), tokens)
        answered = {text_hash(text): variants for text, variants in made.items()}
        files.put_by_hash(chunk, {**files.known(chunk), **answered})


def vllm_processor(recipe: Recipe, pool: Pool) -> Processor:
    """Return Ray's own processor with vLLM as its engine, for a recipe's generator."""
    # Here alone: it imports torch, and few jobs have it.
    from ray.data.llm import build_processor

    assert recipe.generate is not None, "the recipe generates nothing"
    request = partial(request_of, generation=recipe.generate)
    processor: Processor = build_processor(
        vllm_config(recipe, pool), preprocess=request, postprocess=dict
    )
    return processor


def vllm_config(recipe: Recipe, pool: Pool) -> Any:
    """Return the config of Ray's processor: the generator's model, its sizes, and its actors."""
    from ray.data.llm import vLLMEngineProcessorConfig

    made = recipe.generate
    assert made is not None, "the recipe generates nothing"
    actors: int | tuple[int, int] = 1
    if isinstance(pool.actors, ActorRange):
        actors = (pool.actors.min, pool.actors.max)
    elif isinstance(pool.actors, int):
        actors = pool.actors
    return vLLMEngineProcessorConfig(
        model_source=str(made.model),
        engine_kwargs={
            "revision": made.revision,
            "dtype": made.dtype,
            "seed": made.seed,
            "max_model_len": made.max_prompt_tokens + made.max_new_tokens,
            "tensor_parallel_size": max(1, int(pool.gpus_per_actor)),
            "trust_remote_code": recipe.trust_remote_code,
            # The instruction, and the demonstrations in part, are the same in many prompts.
            "enable_prefix_caching": True,
            # The model's own settings (top_k, penalties) would change what is drawn.
            "generation_config": "vllm",
        },
        concurrency=actors,
        batch_size=_SEQUENCES,
        # Conversations are written and tokenized here, as for the other engine.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )


def request_of(row: Mapping[str, Any], *, generation: Generation) -> dict[str, Any]:
    """Return what an engine needs beside a question's ids: how its answer is sampled."""
    return {
        "sampling_params": {
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "max_tokens": generation.max_new_tokens,
            "stop_token_ids": list(generation.stop_ids or ()),
            "seed": row["seed"],
            "detokenize": False,
        }
    }


def seed_of(question: Question) -> int:
    """Return the seed of one answer, in 63 bits of the key of its draws."""
    return int.from_bytes(question.key[:8], "little") >> 1


def _generation(vllm_pass: VllmPass) -> Generation:
    made = _recipe(vllm_pass).generate
    assert made is not None, "the recipe generates nothing"
    return made


@lru_cache(maxsize=1)
def _recipe(vllm_pass: VllmPass) -> Recipe:
    return Recipe.model_validate_json(vllm_pass.recipe_json)


@lru_cache(maxsize=1)
def _questioner(vllm_pass: VllmPass) -> Questioner:
    return load_questioner(_recipe(vllm_pass))
