from pathlib import Path

import pytest

from embedjob.config.generation import Generation, Transformation
from embedjob.config.recipe import Recipe
from embedjob.config.segments import Demonstration
from embedjob.errors import ConfigError
from embedjob.models.questions import Questioner, load_questioner
from embedjob.text.conversations import Variant, draw_key, drawn_shots, text_hash
from tests.encoder.tiny import CHAT, save_chat
from tests.fakes import tiny_tokenizer

SHOTS = tuple(Demonstration(text=f"What is {n}?", answer=f"It is {n}.") for n in range(6))
KINDS = {
    "shorter": Transformation(instruction="Say less.", demonstrations=SHOTS),
    "longer": Transformation(instruction="Say more."),
}
MADE = Generation(model="m", kinds=KINDS, count=2, shots=2, chat_template=CHAT, stop_ids=(1,))


def questioner(**keys: object) -> Questioner:
    return Questioner(MADE.model_copy(update=keys), tiny_tokenizer("qwen"))


def written(text: str, kind: str, number: int) -> str:
    """A question as a chat is written, by hand."""
    key = draw_key(text_hash(text), seed=42, kind=kind, number=number)
    turns = [("user", KINDS[kind].instruction), ("assistant", "Alright.")]
    for one in drawn_shots(key, KINDS[kind].demonstrations, 2):
        turns += [("user", one.text), ("assistant", one.answer)]
    turns.append(("user", text))
    said = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{said}<|im_start|>assistant\n"


def test_each_kind_is_asked_so_often_about_each_text_with_draws_of_its_own() -> None:
    texts = ["A fox.", " a dog "]
    asked = questioner().transformations(texts)
    expected = [(t, kind, n) for t in range(2) for kind in KINDS for n in range(2)]
    assert [(one.about, one.kind, one.number) for one in asked] == expected
    for one in asked:
        whole = written(texts[one.about], one.kind, one.number)
        assert one.ids == tiny_tokenizer("qwen").encode(whole, add_special_tokens=False).ids
    assert asked[0].ids != asked[1].ids
    alone = questioner().transformations(texts[1:])
    assert [(one.key, one.ids) for one in alone] == [(one.key, one.ids) for one in asked[4:]]


def test_nothing_is_asked_about_a_blank_text() -> None:
    assert questioner().transformations(["", " \n"]) == []


def test_a_summary_is_asked_for_of_what_was_made() -> None:
    made = [[Variant("shorter", 0, "Less.", 1), Variant("longer", 1, None, 0)], []]
    [one] = questioner(summaries=True).summaries(["A fox.", ""], made)
    assert (one.about, one.kind, one.number) == (0, "shorter summary", 0)
    assert questioner().shown(one).endswith("Sentence: Less.<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_strips_strips_the_text_too() -> None:
    stripping = CHAT.replace("message['content']", "message['content'] | trim")
    bare, blank = questioner(chat_template=stripping, shots=0).transformations(["fox", " fox "])[
        ::4
    ]
    assert bare.ids == blank.ids


def recipe(folder: Path, **keys: object) -> Recipe:
    made = MADE.model_copy(update={"model": str(folder), "max_prompt_tokens": 200, **keys})
    return Recipe(model="m", generate=made)


def test_a_prompt_without_room_for_its_text_is_refused(tmp_path: Path) -> None:
    save_chat(tmp_path)
    load_questioner(recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"max_prompt_tokens: got 40, but kind shorter"):
        load_questioner(recipe(tmp_path, max_prompt_tokens=40))
    with pytest.raises(ConfigError, match=r"has 4096 positions; allowed is 4046 at most"):
        load_questioner(recipe(tmp_path, max_prompt_tokens=4090, max_new_tokens=50))
