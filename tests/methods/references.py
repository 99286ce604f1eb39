"""The methods as their authors' own code runs them: one text at a time, no padding, no sharing.

Nothing of the library is used here. Each reference gives, per view, the token ids and the pooled
positions, and the one vector of the text.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

MAX_LENGTH = 40  # what the settings give to methods that cut by the tokenizer
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
STS = "Retrieve semantically similar text."
EOL = 'This sentence : "*sent_0*" means in one word:"'
COT = 'After thinking step by step , this sentence : "*sent_0*" means in one word:"'
KE = (
    "The essence of a sentence is often captured by its main subjects and actions, while"
    " descriptive terms provide additional but less central details. With this in mind , this"
    ' sentence : "*sent_0*" means in one word:"'
)


@dataclass(frozen=True)
class Expected:
    ids: list[list[int]]
    pooled: list[list[int]]
    vector: Tensor


Reference = Callable[[Tokenizer, PreTrainedModel, str], Expected]


@torch.inference_mode()
def run(model: PreTrainedModel, ids: list[int], *, both_ways: bool = False) -> tuple[Tensor, ...]:
    """All hidden states [T, D] of one unpadded text."""
    kwargs = {}
    if both_ways:  # an additive mask that hides nothing
        kwargs["attention_mask"] = torch.zeros(1, 1, len(ids), len(ids))
    output = model(torch.tensor([ids]), output_hidden_states=True, **kwargs)
    return tuple(state[0] for state in output.hidden_states)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def bert(prefix: str = "", *, cls: bool = False, first_last: bool = False) -> Reference:
    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.enable_truncation(MAX_LENGTH)
        ids = tok.encode(prefix + text).ids
        hidden = run(model, ids)
        states = (hidden[1] + hidden[-1]) / 2 if first_last else hidden[-1]
        pooled = states[0] if cls else states.mean(dim=0)
        return Expected([ids], [[0] if cls else list(range(len(ids)))], unit(pooled))

    return reference


def last_of_eos(prefix: str, *, eos: str) -> Reference:
    """e5-mistral, Qwen3-Embedding: cut to max_length - 1, then the id of EOS."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.enable_truncation(MAX_LENGTH - 1)
        ids = [*tok.encode(prefix + text).ids, tok.token_to_id(eos)]
        return Expected([ids], [[len(ids) - 1]], unit(run(model, ids)[-1][-1]))

    return reference


def gritlm(instruction: str) -> Reference:
    """The instruction is counted in tokens of its own, BOS included."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        before = f"<|user|>\n{instruction}\n<|embed|>\n" if instruction else "<|embed|>\n"
        left_out = len(tok.encode(before).ids)
        ids = tok.encode(before + text).ids
        states = run(model, ids, both_ways=True)[-1]
        kept = list(range(left_out, len(ids)))
        return Expected([ids], [kept], unit(states[left_out:].mean(dim=0)))

    return reference


def llara(suffix: str) -> Reference:
    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        middle = tok.encode(text, add_special_tokens=False).ids[:512]
        ids = tok.encode('"').ids + middle + tok.encode(suffix).ids[1:]
        states = run(model, ids)[-1]
        last = list(range(len(ids) - 8, len(ids)))
        return Expected([ids], [last], unit(states[-8:].mean(dim=0)))

    return reference


def bge_en_icl(task: str, examples: Sequence[tuple[str, str]]) -> Reference:
    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        shown = [f"<instruct>{task}\n<query>{q}\n<response>{r}" for q, r in examples]
        prefix = "\n\n".join(shown) + "\n\n" if shown else ""
        ids = tok.encode(f"{prefix}<instruct>{task}\n<query>{text}\n<response>").ids
        assert ids[-1] == tok.token_to_id("</s>")
        return Expected([ids], [[len(ids) - 1]], unit(run(model, ids)[-1][-1]))

    return reference


def bare_with_eos(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
    """The documents of bge-en-icl: the tokenizer itself puts EOS last."""
    ids = tok.encode(text).ids
    return Expected([ids], [[len(ids) - 1]], unit(run(model, ids)[-1][-1]))


def echo(template: str, prompt: str = "", *, bos: bool = False) -> Reference:
    """The authors' template language: every piece alone, `{!x}` is read and not pooled."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        ids, pooled = ([tok.token_to_id("<s>")], []) if bos else ([], [])
        for piece in filter(None, re.split(r"(\{[^}]*\})", template)):
            inside = piece.startswith("{")
            content = piece[1:-1] if inside else piece
            counts = inside and not content.startswith("!")
            content = content.removeprefix("!")
            filled = content.replace("%%prompt%%", prompt).replace("%%text%%", text)
            found = tok.encode(filled, add_special_tokens=False).ids[:300]
            if counts:
                pooled += range(len(ids), len(ids) + len(found))
            ids += found
        states = run(model, ids)[-1]
        return Expected([ids], [pooled], unit(states[pooled].mean(dim=0)))

    return reference


def autoregembed(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
    ids = tok.encode(f"{text}\nThis sentence means in one word: “").ids
    ids += [tok.token_to_id(f"<EMBED{n}>") for n in range(5)]
    states = run(model, ids)[-1]
    last = list(range(len(ids) - 5, len(ids)))
    return Expected([ids], [last], unit(states[-5:].mean(dim=0)))


def clean(text: str) -> str:
    """The cleaning that PromptEOL and all its followers share."""
    if len(text) > 0 and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    if len(text) > 0 and text[-1] == "?":
        text = text[:-1] + "."
    return text


def eol(*templates: str, layer: int = -1) -> Reference:
    """The last token of every prompt; the plain mean over prompts."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        sentence, rows, vectors = clean(text), [], []
        for template in templates:
            prompt = template.replace("_", " ").replace("*sent 0*", sentence).strip()
            rows.append(tok.encode(prompt).ids)
            vectors.append(run(model, rows[-1])[layer][-1])
        mean = torch.stack(vectors).mean(dim=0)
        return Expected(rows, [[len(ids) - 1] for ids in rows], unit(mean))

    return reference


def fullstop(text: str) -> str:
    """The cleaning of the trajectories paper, which fails on an empty text."""
    return text if text[-1] in string.punctuation else text + "."
