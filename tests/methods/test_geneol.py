"""GenEOL as its authors run it, on a tiny model, with the generations given."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from embedjob.encoder.encoder import Encoder
from embedjob.methods.catalogue import read_method
from embedjob.models.questions import load_questioner
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.variants import views_with_variants
from embedjob.text.views import TokenViews
from tests.encoder.tiny import CHAT, save_chat
from tests.fakes import tiny_tokenizer
from tests.methods import references
from tests.methods.making import Setting, model

FILE = read_method("geneol")
SETTING = Setting("geneol", "document", "llama", "llama3")
MADE = {
    "A man plays.": ["Somebody plays a guitar.", "  blanks  ", "A man plays.", 'He said "no"?'],
    "日本語の文章": ["Eine Übersetzung", "{text} and _x_"],
    "alone": [],
}


def test_prompts_and_demonstrations_are_the_authors() -> None:
    """Instruction, then ten pairs, of each of the four, as prompts_utils.py has them."""
    assert FILE.generate is not None
    lines = []
    for kind in FILE.generate["kinds"].values():
        assert len(kind["demonstrations"]) == 10
        lines.append(kind["instruction"])
        lines += [one[side] for one in kind["demonstrations"] for side in ("text", "answer")]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "42d36df6d7baeb9c"
    assert FILE.generate["shots"] == 5
    assert FILE.generate["acknowledgement"] == "Alright."


class Beside:
    """A tokenizer of texts and of what was made of them."""

    def __init__(self, tokenizer: ViewTokenizer) -> None:
        self.tokenizer = tokenizer

    def views(self, texts: Sequence[str]) -> TokenViews:
        return views_with_variants(self.tokenizer, texts, [MADE[text] for text in texts])


def test_a_text_is_the_plain_mean_of_its_own_vector_and_those_of_what_was_made_of_it() -> None:
    raw = SETTING.with_knobs(finish=[])
    found = raw.encode(Beside(raw.views()), list(MADE)).embeddings  # type: ignore[arg-type]
    for row, (text, generated) in enumerate(MADE.items()):
        expected = references.geneol_beside(generated)(SETTING.tokenizer(), model("llama"), text)
        vector = found[row] / np.linalg.norm(found[row])
        assert np.abs(vector - expected.vector.numpy()).max() <= 1e-5, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("geneol"))


def test_what_is_asked_is_the_authors_conversation(folder: Path) -> None:
    """User, `Alright.`, five of the ten demonstrations, the sentence: by transformers' own hand."""
    made = {"max_prompt_tokens": 3000, "max_new_tokens": 4}
    encoder = Encoder.from_method("geneol", model=str(folder), device="cpu", generate=made)
    recipe = encoder.recipe
    assert recipe.generate is not None
    assert recipe.generate.texts == 8
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer("qwen"), chat_template=CHAT, eos_token="<|im_end|>"
    )
    asked = load_questioner(recipe).transformations(["A man plays."])
    assert [(one.kind, one.number) for one in asked] == [
        (kind, number) for kind in recipe.generate.kinds for number in range(2)
    ]
    for one in asked:
        kind = recipe.generate.kinds[one.kind]
        shown = [
            shot
            for _, shot in sorted(
                (theirs.decode(one.ids).index(f"<|im_start|>user\n{shot.text}<|im_end|>"), shot)
                for shot in kind.demonstrations
                if f"<|im_start|>user\n{shot.text}<|im_end|>" in theirs.decode(one.ids)
            )
        ]
        assert len(shown) == 5
        turns = [("user", kind.instruction), ("assistant", "Alright.")]
        for shot in shown:
            turns += [("user", shot.text), ("assistant", shot.answer)]
        turns.append(("user", "A man plays."))
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert one.ids == ids


def test_the_encoder_embeds_what_its_generator_says(folder: Path) -> None:
    made = {"max_prompt_tokens": 3000, "max_new_tokens": 4, "count": 1}
    keys = {"model": str(folder), "device": "cpu", "finish": []}
    encoder = Encoder.from_method("geneol", generate=made, **keys)
    plain = Encoder.from_config({**FILE.encoder, "model": str(folder), "finish": []}, device="cpu")
    texts = ["A man plays.", "A dog.", "A man plays."]
    generated = encoder.generated(texts)
    assert generated[0] == generated[2]
    assert {len(own) for own in generated} == {4}
    found = encoder.encode(texts)
    means = [
        plain.encode([text, *own]).mean(axis=0) for text, own in zip(texts, generated, strict=True)
    ]
    assert np.allclose(found, np.stack(means), atol=1e-5)


@pytest.mark.slow
def test_smollm2_rewrites_a_sentence_and_is_embedded_with_it() -> None:
    made = {"count": 1, "max_new_tokens": 32}
    encoder = Encoder.from_method("geneol", device="cpu", generate=made, finish=[])
    texts = ["A man is playing a guitar on the street.", "Two dogs run through deep snow."]
    generated = encoder.generated(texts)
    assert generated == encoder.generated(texts[::-1])[::-1]
    for text, own in zip(texts, generated, strict=True):
        assert len(own) == 4
        # It is tuned to follow instructions: what it says is another sentence about the same.
        assert sum(one != text for one in own) >= 3
        assert all("<|im_" not in one for one in own)
    plain = Encoder.from_config(
        {**FILE.encoder, "model": FILE.model, "finish": []}, device="cpu"
    ).encode([one for text, own in zip(texts, generated, strict=True) for one in (text, *own)])
    means = plain.reshape(2, 5, -1).mean(axis=1)
    found = encoder.encode(texts)
    cosines = (
        (found * means).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(means, axis=1)
    )
    assert cosines.min() >= 0.99999
