import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from embedjob.errors import ConfigError, ModelError
from embedjob.models.chat_template import ChatTemplate, read_chat_template
from embedjob.text.conversations import MARK
from tests.encoder.tiny import CHAT, save_chat
from tests.fakes import tiny_tokenizer

TALK = (
    {"role": "user", "content": "Rewrite."},
    {"role": "assistant", "content": "Alright."},
    {"role": "user", "content": MARK},
)
TRIMMING = CHAT.replace("message['content']", "message['content'] | trim")
OF_LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}{{- bos_token }}Today Date: {{ date_string }}\n" + CHAT
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat"))


def test_what_is_written_is_what_transformers_writes(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer("qwen"), chat_template=CHAT, eos_token="<|im_end|>"
    )
    chat = read_chat_template(folder, model="m")
    for text in ("A fox.", " two  blanks ", 'She said: "no"\n', "日本語 {x} {{y}}"):
        said = [*TALK[:2], {"role": "user", "content": text}]
        [prompt] = chat.prompts([TALK])
        whole = theirs.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        assert prompt.render(text) == whole
        ids = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        own = tiny_tokenizer("qwen").encode(whole, add_special_tokens=False).ids
        assert own == ids


def test_the_tokens_that_end_an_answer_are_those_of_all_files(folder: Path, tmp_path: Path) -> None:
    ends = tiny_tokenizer("qwen").token_to_id("<|im_end|>")
    assert read_chat_template(folder, model="m").stops == (ends,)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, ends]}))
    assert read_chat_template(tmp_path, model="m").stops == (5, ends)


@pytest.mark.parametrize(
    "written",
    [
        {"chat_template": CHAT},
        {
            "chat_template": [
                {"name": "tool_use", "template": "x"},
                {"name": "default", "template": CHAT},
            ]
        },
    ],
)
def test_a_template_may_stand_in_the_tokenizers_config(
    folder: Path, tmp_path: Path, written: dict[str, object]
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    spelled = {"bos_token": {"content": "<s>"}, "eos_token": None, "eos_token_id": 3}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**written, **spelled}))
    chat = read_chat_template(tmp_path, model="m")
    assert chat.template == CHAT
    assert chat.tokens == {"bos_token": "<s>"}


def test_a_model_without_a_template_cannot_follow_instructions(tmp_path: Path) -> None:
    save_chat(tmp_path, template=None)
    with pytest.raises(ModelError, match=r"generate\.model: tiny has no chat template"):
        read_chat_template(tmp_path, model="tiny")


def test_a_template_that_leaves_the_text_out_is_refused() -> None:
    lost = ChatTemplate("{{ messages[0]['content'] }}", {}, ())
    with pytest.raises(ConfigError, match="does not write what the user says last"):
        lost.prompts([TALK])
    bad = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, ())
    with pytest.raises(ConfigError, match="roles must alternate"):
        bad.render([TALK])


def test_a_template_tells_whether_it_strips_what_is_said() -> None:
    assert not ChatTemplate(CHAT, {}, ()).strips
    assert ChatTemplate(TRIMMING, {}, ()).strips


def test_a_template_that_asks_for_the_day_is_told_the_same_every_day() -> None:
    [written] = ChatTemplate(OF_LLAMA_3_2, {"bos_token": "<s>"}, ()).render([TALK])
    assert written.startswith("<s>Today Date: 26 Jul 2024\n<|im_start|>user\nRewrite.")
