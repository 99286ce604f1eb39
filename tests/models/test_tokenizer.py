import json
from pathlib import Path
from typing import NoReturn

import pytest
from transformers import BertTokenizer

from embedjob.config.recipe import Recipe, SpecialTokens
from embedjob.errors import InterruptedRunError, ModelError
from embedjob.models import tokenizer
from embedjob.models.tokenizer import load_tokenizer, lowercases, read_tokenizer
from tests.encoder import tiny


def test_a_saved_habit_of_cutting_and_padding_is_dropped(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path)
    plain = read_tokenizer(folder).encode("the lazy dog " * 20).ids
    saved = tiny.tokenizer("bert")
    saved.enable_truncation(8)
    saved.enable_padding(length=300)
    saved.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).encode("the lazy dog " * 20).ids == plain
    assert len(plain) > 40


def test_a_vocabulary_without_tokenizer_json_will_do(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path)
    ready = read_tokenizer(folder).encode("The quick brown fox").ids
    words = sorted(tiny.tokenizer("bert").get_vocab().items(), key=lambda item: item[1])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words), encoding="utf-8")
    assert read_tokenizer(folder).encode("The quick brown fox").ids == ready
    assert BertTokenizer.from_pretrained(folder)("The quick brown fox")["input_ids"] == ready


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer can be read in"):
        read_tokenizer(folder)


def test_a_signal_while_a_tokenizer_is_read_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        """A signal is handled as soon as the library's own code has ended."""

        @staticmethod
        def from_file(_: str) -> NoReturn:
            raise InterruptedRunError("stopped by SIGTERM")

    monkeypatch.setattr(tokenizer, "Tokenizer", Interrupted)
    with pytest.raises(InterruptedRunError, match=r"^stopped by SIGTERM$"):
        read_tokenizer(tiny.save("llama", tmp_path))


def test_a_tokenizer_of_the_folders_own_code_is_refused_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("llama", tmp_path)
    (folder / "tokenizer.json").unlink()
    named = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "theirs.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ModelError, match=r"(?s)no tokenizer can be read in .*trust_remote"):
        read_tokenizer(folder)


def test_the_end_of_text_is_the_one_of_config_json(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    special = SpecialTokens(eos="append")
    recipe = Recipe(model=str(folder), max_tokens=40, special_tokens=special)
    assert load_tokenizer(recipe).views(["a"]).full_ids(0)[-1] == 2


@pytest.mark.parametrize(("name", "expected"), [("bert", True), ("gpt2", False)])
def test_capitals_matter_to_some(name: str, expected: bool, tmp_path: Path) -> None:
    assert lowercases(tiny.save(name, tmp_path)) is expected
