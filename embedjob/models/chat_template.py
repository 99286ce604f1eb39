"""Chat templates: how a model writes a conversation, and the tokens that end its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedjob.errors import ConfigError, ModelError
from embedjob.models.architecture import config_of
from embedjob.models.checkpoint import read_json
from embedjob.models.source import transformer_directory
from embedjob.models.tokenizer import read_tokenizer
from embedjob.text.conversations import MARK, Conversation, Message, as_prompt
from embedjob.text.prompts import Prompt

# Some templates name the day, and prompts must not differ from one day to the next. This is the day
# that Llama's templates name where they cannot ask for it.
_DAY = "26 Jul 2024"
_ASKS_FOR_THE_DAY = "strftime_now"
_FIXED = f"{{%- macro {_ASKS_FOR_THE_DAY}(form) -%}}{_DAY}{{%- endmacro -%}}"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, the special tokens that it names, and the ids that end an answer."""

    template: str
    tokens: Mapping[str, str]
    stops: tuple[int, ...]

    def prompts(self, conversations: Sequence[Conversation]) -> list[Prompt]:
        """Return what each conversation has before and after its text.

        ConfigError where the template leaves the text out, or cannot write the conversation.
        """
        prompts = [as_prompt(written) for written in self.render(conversations)]
        if None in prompts:
            raise ConfigError(
                "generate.chat_template: does not write what the user says last exactly once; give"
                " another one"
            )
        return [prompt for prompt in prompts if prompt is not None]

    @property
    def strips(self) -> bool:
        """Whether the template takes the blanks off the ends of what is said."""
        [written] = self.render([[{"role": "user", "content": f" {MARK} "}]])
        return f" {MARK} " not in written

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return each conversation as the model reads it, up to where its answer begins.

        ConfigError where the template cannot write them.
        """
        # transformers takes seconds to import, and few jobs have a generator.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        fixed = _FIXED if _ASKS_FOR_THE_DAY in self.template else ""
        given: Any = dict(self.tokens)
        chats: Any = [[dict(message) for message in chat] for chat in conversations]
        try:
            # Typed as one text, it is a list of them and what is of no use here.
            written: Any = render_jinja_template(
                chats, chat_template=fixed + self.template, add_generation_prompt=True, **given
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                "generate.chat_template: cannot write a conversation of user and assistant"
                f" ({error}); give another one"
            ) from error
        return list(written[0])


def read_chat_template(directory: Path, *, model: str) -> ChatTemplate:
    """Read a model's chat template, with the tokens that it names and the ids that end answers.

    ModelError where the model has no chat template: `model` is its name in the job.
    """
    inner = transformer_directory(directory)
    config = read_json(inner / "tokenizer_config.json") or {}
    template = _template(inner, config)
    if template is None:
        raise ModelError(
            f"generate.model: {model} has no chat template (chat_template.jinja, or chat_template"
            " in tokenizer_config.json): a generator has to follow instructions. Give an"
            " instruction-tuned model, or set generate.chat_template"
        )
    tokens = special_tokens(directory)
    return ChatTemplate(template, tokens, stop_ids(directory, tokens))


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the names of a model's special tokens by their part: {"eos_token": "</s>", ...}."""
    inner = transformer_directory(directory)
    written: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        written |= read_json(inner / name) or {}
    named = {key: value for key, value in written.items() if key.endswith("_token")}
    spelled = {
        key: value.get("content") if isinstance(value, Mapping) else value
        for key, value in named.items()
    }
    return {key: value for key, value in spelled.items() if isinstance(value, str)}


def stop_ids(directory: Path, tokens: Mapping[str, str]) -> tuple[int, ...]:
    """Return the ids that end an answer, by the model's own files, in ascending order."""
    inner = transformer_directory(directory)
    given = [
        (read_json(inner / "generation_config.json") or {}).get("eos_token_id"),
        config_of(directory).get("eos_token_id"),
    ]
    if eos := tokens.get("eos_token"):
        given.append(read_tokenizer(directory).token_to_id(eos))
    ids = [one for value in given for one in (value if isinstance(value, list) else [value])]
    return tuple(sorted({one for one in ids if isinstance(one, int)}))


def _template(inner: Path, config: Mapping[str, Any]) -> str | None:
    written = inner / "chat_template.jinja"
    if written.exists():
        return written.read_text(encoding="utf-8")
    beside = read_json(inner / "chat_template.json") or {}
    found = config.get("chat_template") or beside.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found}.get("default")
    return found if isinstance(found, str) and found else None
