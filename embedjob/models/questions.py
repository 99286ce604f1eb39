"""Questions: what a recipe's generator is asked about texts, as token ids; without its weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from embedjob.config.generation import Generation
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.models.architecture import ModelInfo, config_of, info_of
from embedjob.models.chat_template import ChatTemplate
from embedjob.models.components import generator_recipe
from embedjob.models.source import materialize, source_of
from embedjob.models.tokenizer import read_tokenizer
from embedjob.text.conversations import (
    SUMMARY,
    ConversationEncoder,
    Variant,
    draw_key,
    drawn_shots,
    longest_shots,
    summing_up,
    text_hash,
    transforming,
)
from embedjob.text.prompts import Prompt


@dataclass(frozen=True)
class Question:
    """A prompt that asks for one text: the number of the text that it is about, kind and number.

    `key` is what all its draws come from.
    """

    about: int
    kind: str
    number: int
    key: bytes
    ids: list[int]


class Questioner:
    """Asks about texts as a resolved `generate` section says; one per process."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        """Take the generator's own tokenizer, which it owns from then on."""
        assert generation.chat_template is not None, "the section is not resolved"
        self.generation = generation
        self._tokenizer = tokenizer
        self._template = ChatTemplate(
            generation.chat_template,
            generation.chat_tokens or {},
            generation.stop_ids or (),
        )
        self._strips = self._template.strips
        self._encoder = ConversationEncoder(tokenizer, most=generation.max_prompt_tokens)

    def check_room(self, model: ModelInfo) -> None:
        """Raise ConfigError where a prompt, or an answer to it, has more tokens than there may be.

        `model` are the sizes of the generator.
        """
        most, answer = self.generation.max_prompt_tokens, self.generation.max_new_tokens
        if model.max_positions is not None and most + answer > model.max_positions:
            raise ConfigError(
                f"generate.max_prompt_tokens: got {most}, with {answer} of max_new_tokens, but"
                f" {self.generation.model} has {model.max_positions} positions; allowed is"
                f" {max(0, model.max_positions - answer)} at most"
            )
        for kind, prompt in self._longest():
            if (needed := self._encoder.length(prompt)) > most:
                raise ConfigError(
                    f"generate.max_prompt_tokens: got {most}, but {kind} with a short text has"
                    f" {needed} tokens; set it to {needed} and room for longer texts, or lower"
                    " generate.shots"
                )

    def transformations(self, texts: Sequence[str]) -> list[Question]:
        """Return the questions about each text, one for each kind and number; none for blanks."""
        made = self.generation
        asked = [
            (
                about,
                kind,
                number,
                draw_key(text_hash(text), seed=made.seed, kind=kind, number=number),
            )
            for about, text in enumerate(texts)
            if text.strip()
            for kind in made.kinds
            for number in range(made.count)
        ]
        conversations = [
            transforming(made, kind, drawn_shots(key, made.kinds[kind].demonstrations, made.shots))
            for _, kind, _, key in asked
        ]
        prompts = self._template.prompts(conversations)
        return self._questions(asked, prompts, [texts[about] for about, *_ in asked])

    def summaries(self, texts: Sequence[str], made: Sequence[Sequence[Variant]]) -> list[Question]:
        """Return a question about each thing that was made of each text, to sum it up."""
        asked, about_texts = [], []
        for about, (text, variants) in enumerate(zip(texts, made, strict=True)):
            for one in variants:
                if one.text is not None:
                    kind = f"{one.kind}{SUMMARY}"
                    asked.append((about, kind, one.number, self._key(text, kind, one.number)))
                    about_texts.append(one.text)
        [prompt] = self._template.prompts([summing_up(self.generation)])
        return self._questions(asked, [prompt] * len(asked), about_texts)

    def shown(self, question: Question) -> str:
        """Return a question's prompt as its tokens spell it, for people."""
        return self._tokenizer.decode(question.ids, skip_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return what the ids of an answer say, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _key(self, text: str, kind: str, number: int) -> bytes:
        seed = self.generation.seed
        return draw_key(text_hash(text), seed=seed, kind=kind, number=number)

    def _questions(
        self,
        asked: Sequence[tuple[int, str, int, bytes]],
        prompts: Sequence[Prompt],
        texts: Sequence[str],
    ) -> list[Question]:
        said = [text.strip() for text in texts] if self._strips else texts
        rows = self._encoder.ids(prompts, said)
        return [Question(*one, ids) for one, ids in zip(asked, rows, strict=True)]

    def _longest(self) -> Iterator[tuple[str, Prompt]]:
        made = self.generation
        for kind, one in made.kinds.items():
            shots = longest_shots(one.demonstrations, made.shots)
            yield f"kind {kind}", self._template.prompts([transforming(made, kind, shots)])[0]
        if made.summaries:
            yield "summary", self._template.prompts([summing_up(made)])[0]


def load_questioner(recipe: Recipe) -> Questioner:
    """Return what asks as a recipe's generator is asked; its weights are not fetched.

    ConfigError where the longest prompt has no room.
    """
    generator = generator_recipe(recipe)
    assert recipe.generate is not None, "the recipe generates nothing"
    assert generator is not None, "the recipe is not resolved"
    directory = materialize(source_of(generator), tokenizer_only=True)
    questioner = Questioner(recipe.generate, read_tokenizer(directory))
    questioner.check_room(info_of(config_of(directory)))
    return questioner
