"""The generator against the plain procedure: a text alone, no cache, a number for each token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from embedjob.config.generation import Generation, Transformation
from embedjob.config.recipe import Recipe
from embedjob.config.segments import Demonstration
from embedjob.encoder.generator import Generator
from embedjob.errors import InterruptedRunError, ModelError
from embedjob.models.chat_template import read_chat_template
from embedjob.models.questions import Question, load_questioner
from embedjob.text.conversations import Variant, cleaned, uniforms
from tests.encoder.tiny import save_chat
from tests.fakes import SENTENCES, tiny_tokenizer

SHOTS = tuple(Demonstration(text=f"What is {n}?", answer=f"It is {n}.") for n in range(6))
KINDS = {
    "shorter": Transformation(instruction="Say less.", demonstrations=SHOTS),
    "longer": Transformation(instruction="Say more."),
}
TEXTS = [*SENTENCES[:6], "a", "fox " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("generator"))


def recipe(folder: Path, **keys: Any) -> Recipe:
    chat = read_chat_template(folder, model="m")
    given = {
        "model": str(folder),
        "kinds": KINDS,
        "count": 2,
        "shots": 2,
        "max_new_tokens": 12,
        "max_prompt_tokens": 300,
        "dtype": "float32",
        "chat_template": chat.template,
        "stop_ids": chat.stops,
        **keys,
    }
    return Recipe(model="m", generate=Generation(**given))


def generator(folder: Path, *, sequences: int = 8, **keys: Any) -> Generator:
    return Generator.from_recipe(recipe(folder, **keys), device="cpu", sequences=sequences)


@torch.inference_mode()
def literal(model: PreTrainedModel, question: Question, made: Generation) -> list[int]:
    """The tokens of one answer: softmax, nucleus, the token at which the sum passes a number."""
    said: list[int] = []
    for number in uniforms(question.key, made.max_new_tokens).tolist():
        logits = model(torch.tensor([[*question.ids, *said]])).logits[0, -1]
        if made.temperature == 0:
            token = int(logits.argmax())
        else:
            shares = (logits / made.temperature).softmax(dim=0)
            best, order = shares.sort(descending=True)
            kept = order[best.cumsum(dim=0) - best < made.top_p]
            inside = torch.zeros_like(shares, dtype=torch.float64)
            inside[kept] = shares[kept].double()
            sums = inside.cumsum(dim=0) / inside.sum()
            token = int((sums <= number).sum())
        if token in (made.stop_ids or ()):
            break
        said.append(token)
    return said


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.6), (0.0, 1.0)], ids=["all", "nucleus", "greedy"]
)
def test_what_is_said_is_what_the_plain_procedure_says(
    folder: Path, temperature: float, top_p: float
) -> None:
    ours = recipe(folder, temperature=temperature, top_p=top_p)
    made = ours.generate
    assert made is not None
    found = Generator.from_recipe(ours, device="cpu", sequences=5).generate(TEXTS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected: list[list[Variant]] = [[] for _ in TEXTS]
    for one in load_questioner(ours).transformations(TEXTS):
        ids = literal(model, one, made)
        text = cleaned(tiny_tokenizer("qwen").decode(ids))
        expected[one.about].append(Variant(one.kind, one.number, text, len(ids)))
    assert [list(variants) for variants in found] == expected
    said = [one.tokens for variants in found for one in variants]
    assert 0 < sum(tokens < 12 for tokens in said) < len(said)  # some end by themselves


def test_the_company_and_the_order_of_texts_do_not_matter(folder: Path) -> None:
    whole = generator(folder).generate(TEXTS)
    assert generator(folder, sequences=1).generate(TEXTS) == whole
    assert generator(folder, sequences=32).generate(TEXTS[::-1]) == whole[::-1]
    assert generator(folder).generate(TEXTS[3:5]) == whole[3:5]
    assert generator(folder, count=1).generate(TEXTS) == [one[::2] for one in whole]
    assert generator(folder, seed=1).generate(TEXTS) != whole


def test_the_models_own_settings_change_nothing(folder: Path, tmp_path: Path) -> None:
    """A repetition penalty or a limit by rank in its generation_config.json is not applied."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = '{"do_sample": true, "top_k": 1, "repetition_penalty": 5.0, "max_length": 30}'
    (tmp_path / "generation_config.json").write_text(settings)
    assert generator(tmp_path).generate(TEXTS) == generator(folder).generate(TEXTS)


def test_nothing_is_made_of_a_blank_text(folder: Path) -> None:
    [blank, other] = generator(folder).generate(["  ", "a"])
    assert (blank, len(other)) == ((), 4)
    assert generator(folder, summaries=True).generate([""]) == [()]
    assert generator(folder).generate([]) == []


def test_it_says_how_far_it_is_after_each_batch(folder: Path) -> None:
    said: list[tuple[int, int]] = []
    made = generator(folder, sequences=3).generate(
        TEXTS, answered=lambda *so_far: said.append(so_far)
    )
    every = [one for variants in made for one in variants]
    assert said == sorted(said)
    assert len(said) == -(-len(every) // 3)
    assert said[-1] == (len(every), sum(one.tokens for one in every))


def test_each_answer_is_summed_up_where_asked(folder: Path) -> None:
    plain = generator(folder).generate(TEXTS[:3])
    summed = generator(folder, summaries=True).generate(TEXTS[:3])
    for before, after in zip(plain, summed, strict=True):
        assert after[: len(before)] == before
        summaries = [(one.kind, one.number) for one in after[len(before) :]]
        said = [(f"{one.kind} summary", one.number) for one in before if one.text is not None]
        assert summaries == said
        assert said


def test_a_batch_that_fails_is_halved_and_what_fails_alone_says_nothing(folder: Path) -> None:
    broken = generator(folder)
    whole = broken.generate(TEXTS)
    bad = tiny_tokenizer("qwen").encode("fox fox fox", add_special_tokens=False).ids

    def fail(_model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        rows = inputs["input_ids"].tolist()
        if any(row[n : n + len(bad)] == bad for row in rows for n in range(len(row))):
            raise RuntimeError("this model cannot bear many foxes")

    broken._model.model.register_forward_pre_hook(fail, with_kwargs=True)
    found = broken.generate(TEXTS)
    assert found[:-1] == whole[:-1]
    assert {(one.text, one.tokens) for one in found[-1]} == {(None, 0)}


def test_less_memory_than_a_batch_needs_makes_smaller_batches(folder: Path) -> None:
    small = generator(folder)
    whole, most = small.generate(TEXTS), 3

    def fail(_model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > most:
            raise RuntimeError("CUDA out of memory")

    small._model.model.register_forward_pre_hook(fail, with_kwargs=True)
    assert small.generate(TEXTS) == whole
    assert small._most == 2


def test_a_stop_is_heard_between_two_tokens_and_progress_is_told(folder: Path) -> None:
    steps: list[int] = []

    def stop() -> bool:
        return len(steps) > 3

    with pytest.raises(InterruptedRunError, match="stopped between two tokens"):
        generator(folder).generate(TEXTS, stop=stop, moved=lambda: steps.append(1))
    assert len(steps) == 4


def test_a_recipe_without_a_generator_is_refused() -> None:
    with pytest.raises(ModelError, match="the recipe has no generator"):
        Generator.from_recipe(Recipe(model="m"))
