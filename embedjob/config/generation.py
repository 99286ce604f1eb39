"""Generation as config values: which texts a language model makes of a text before it is embedded.

A recipe holds the section resolved: all that decides what the model says, and where the model is.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from embedjob.config.segments import Demonstration
from embedjob.config.types import NonEmptyStr, Positive, Section

# What stands for the text in `summary`.
SLOT = "{text}"
GeneratorEngine = Literal["transformers", "vllm"]
# Without blanks: a summary has its kind's name and a word more.
KindName = Annotated[str, Field(pattern=r"^\w+$")]


class Transformation(Section):
    """One kind of text to make: what the model is asked, and the examples that are drawn from.

    Each example is a turn of the user (`text`) and the answer to it.
    """

    instruction: NonEmptyStr
    demonstrations: tuple[Demonstration, ...] = ()

    @model_validator(mode="after")
    def _has_one_instruction(self) -> "Transformation":
        if any(one.instruction is not None for one in self.demonstrations):
            raise ValueError(
                "a demonstration here has no instruction of its own; leave it out, or make another"
                " kind"
            )
        return self


class Generation(Section):
    """What a language model makes of each text; the vectors of all are averaged with the text's.

    Every kind is asked `count` times, each time with other draws: `shots` of its demonstrations in
    a random order, and the words themselves; `acknowledgement` is the model's answer to the
    instruction, which comes first. With `summaries` each answer is asked to be summed up
    by `summary`, and the summary takes its place. `temperature: 0` takes the likeliest token; there
    is no limit by rank (top_k). A prompt has at most `max_prompt_tokens`: the text is cut to fit.
    `chat_template`, the special tokens that it names and the ids that end an answer are the
    model's own where they are null.
    """

    model: str | None = None
    revision: str | None = None
    kinds: dict[KindName, Transformation] = Field(default_factory=dict)
    count: Positive = 1
    shots: Annotated[int, Field(ge=0)] = 5
    acknowledgement: NonEmptyStr = "Alright."
    summaries: bool = False
    summary: NonEmptyStr = (
        "Summarize the input sentence while preserving the exact meaning of the sentence. Do not"
        " output any additional explanation. Only output the summary.\nSentence: {text}"
    )
    engine: GeneratorEngine = "transformers"
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 128
    max_prompt_tokens: Positive = 1024
    seed: int = 42
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    chat_template: NonEmptyStr | None = None
    chat_tokens: dict[str, str] | None = None
    stop_ids: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> "Generation":
        if self.summary.count(SLOT) != 1:
            raise ValueError(f"summary: got {self.summary!r}, allowed is a text with one {SLOT}")
        return self

    @property
    def texts(self) -> int:
        """How many texts are embedded beside each text."""
        return len(self.kinds) * self.count


class TrajectorySettings(Section):
    """How texts are compared by what a language model goes on with; the defaults are the paper's.

    Of each text `count` continuations of up to `max_new_tokens` are sampled at a `temperature`,
    without a limit by rank, and cut after the first token that ends a text. `prompt` is around a
    text that `prepare` has cleaned: `fullstop` ends it with a full stop. A text is cut so that it
    has `max_tokens` with its prompt. `seed` makes other draws.
    """

    count: Positive = 20
    max_new_tokens: Positive = 20
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    prompt: str = SLOT
    prepare: Literal["none", "fullstop"] = "fullstop"
    max_tokens: Positive = 512
    seed: int = 42

    @model_validator(mode="after")
    def _has_its_text(self) -> "TrajectorySettings":
        if self.prompt.count(SLOT) != 1:
            raise ValueError(f"prompt: got {self.prompt!r}, allowed is a text with one {SLOT}")
        return self
