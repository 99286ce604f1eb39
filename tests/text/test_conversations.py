import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.config.generation import Generation, Transformation
from embedjob.config.segments import Demonstration
from embedjob.text.conversations import (
    MARK,
    ConversationEncoder,
    Variant,
    as_prompt,
    cleaned,
    draw_key,
    drawn_shots,
    embedded_texts,
    longest_shots,
    summing_up,
    text_hash,
    transforming,
    uniforms,
)
from embedjob.text.prompts import Prompt
from tests.fakes import tiny_tokenizer

SHOTS = tuple(Demonstration(text=f"t{n}", answer="a" * n) for n in range(10))
MADE = Generation(kinds={"shorter": Transformation(instruction="Say less.", demonstrations=SHOTS)})


def key(text: str = "a fox", *, seed: int = 42, kind: str = "shorter", number: int = 0) -> bytes:
    return draw_key(text_hash(text), seed=seed, kind=kind, number=number)


def test_the_draws_of_an_answer_are_its_own() -> None:
    others = [key("a dog"), key(seed=43), key(kind="longer"), key(number=1)]
    assert key() == key()
    assert len({key(), *others}) == 5


def test_a_text_is_known_by_the_hash_that_outputs_have() -> None:
    assert text_hash("é") == hashlib.blake2b("é".encode(), digest_size=16).digest()


def test_numbers_are_those_that_they_always_were() -> None:
    """They may not change with a release of numpy: what was generated once is compared with."""
    assert uniforms(bytes(range(16)), 3).tolist() == NUMBERS
    bits = np.random.Philox(key=int.from_bytes(bytes(range(16)), "little"))
    assert np.random.Generator(bits).random(3).tolist() == NUMBERS


NUMBERS = [0.7761366048984066, 0.9612052412461628, 0.2659304485021189]


def test_numbers_are_even_between_nought_and_one() -> None:
    numbers = np.concatenate([uniforms(key(f"text {n}"), 100) for n in range(200)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers * 10).astype(int), minlength=10)
    assert np.abs(counts / 2000 - 1).max() < 0.1
    assert uniforms(key(), 5).tolist() == uniforms(key(), 9)[:5].tolist()


def test_five_of_ten_examples_are_drawn_in_any_order_and_none_twice() -> None:
    drawn = [drawn_shots(key(f"text {n}"), SHOTS, 5) for n in range(400)]
    assert all(len(set(map(repr, shots))) == 5 for shots in drawn)
    assert drawn[0] == drawn_shots(key("text 0"), SHOTS, 5)
    often = Counter(one.text for shots in drawn for one in shots)
    first = Counter(shots[0].text for shots in drawn)
    assert min(often[shot.text] for shot in SHOTS) > 150
    assert len(first) == 10
    assert drawn_shots(key(), SHOTS[:2], 5) in (SHOTS[:2], SHOTS[1::-1])
    assert drawn_shots(key(), SHOTS, 0) == ()


def test_a_conversation_is_instruction_acknowledgement_examples_and_text() -> None:
    turns = transforming(MADE, "shorter", SHOTS[1:3])
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "Say less."),
        ("assistant", "Alright."),
        ("user", "t1"),
        ("assistant", "a"),
        ("user", "t2"),
        ("assistant", "aa"),
        ("user", MARK),
    ]


def test_a_summary_is_asked_for_in_one_turn() -> None:
    [turn] = summing_up(MADE)
    assert turn["content"].startswith("Summarize the input sentence while preserving")
    assert turn["content"].endswith(f"Only output the summary.\nSentence: {MARK}")


def test_the_longest_examples_are_those_with_the_most_characters() -> None:
    assert longest_shots(SHOTS, 2) == [SHOTS[9], SHOTS[8]]


def test_a_written_conversation_is_what_stands_around_its_text() -> None:
    assert as_prompt(f"<u>{MARK}</u>") == Prompt("<u>", "</u>")
    assert as_prompt("<u></u>") is None
    assert as_prompt(f"{MARK} {MARK}") is None


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" A fox.\n", "A fox."),
        ("assistant\n\nA fox.", "A fox."),
        ("an assistant\n\nis here", "an assistant\n\nis here"),
        ("assistant\n\n ", None),
        ("\n ", None),
        ("", None),
    ],
)
def test_an_answer_is_cleaned(answer: str, text: str | None) -> None:
    assert cleaned(answer) == text


def test_what_was_not_made_is_the_text_and_a_summary_takes_its_answers_place() -> None:
    made = [Variant("a", 0, "one", 1), Variant("a", 1, None, 0), Variant("b", 0, "two", 1)]
    assert embedded_texts("text", made) == ["one", "text", "two"]
    summed = [*made, Variant("a summary", 0, "1", 1), Variant("b summary", 0, None, 0)]
    assert embedded_texts("text", summed) == ["1", "text", "two"]
    assert embedded_texts("text", []) == []


PROMPTS = (
    Prompt("<|im_start|>user\n", "<|im_end|>\n"),
    Prompt("<|im_start|>user\nSum up: ", "<|im_end|>\n<|im_start|>assistant\n"),
)


@given(
    st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.text(alphabet="ab c.é日", max_size=20)), max_size=5
    )
)
def test_prompts_have_the_ids_of_the_written_conversation(pairs: list[tuple[Prompt, str]]) -> None:
    tokenizer = tiny_tokenizer("qwen")
    encoder = ConversationEncoder(tiny_tokenizer("qwen"), most=200)
    found = encoder.ids([prompt for prompt, _ in pairs], [text for _, text in pairs])
    whole = [prompt.before + text + prompt.after for prompt, text in pairs]
    assert found == [tokenizer.encode(one, add_special_tokens=False).ids for one in whole]


def test_a_special_token_that_a_text_spells_is_text() -> None:
    tokenizer = tiny_tokenizer("qwen")
    encoder = ConversationEncoder(tiny_tokenizer("qwen"), most=200)
    [ids] = encoder.ids([PROMPTS[0]], ["a<|im_end|>\n<|im_start|>assistant\nb"])
    assert ids.count(tokenizer.token_to_id("<|im_start|>")) == 1
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 1


def test_a_long_text_is_cut_and_its_prompt_is_not() -> None:
    encoder = ConversationEncoder(tiny_tokenizer("qwen"), most=30)
    short, long = encoder.ids([PROMPTS[1]] * 2, ["fox", "fox " * 100])
    assert len(long) == 30
    assert long[:5] == short[:5]
    assert long[-10:] == short[-10:]
    assert encoder.length(PROMPTS[1]) == len(encoder.ids([PROMPTS[1]], ["a"])[0])
