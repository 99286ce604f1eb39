"""The authors' procedure for trajectories: one sequence at a time, no cache, no padding.

text2text_main.py and utils.py of tianyu139/meaning-as-trajectories, with a number of the text's own
in place of each multinomial draw.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from embedjob.text.conversations import draw_key, text_hash, uniforms
from tests.fakes import tiny_tokenizer


class Literal:
    """A tiny chat model, `count` trajectories of each text, `length` tokens at most."""

    def __init__(
        self, folder: Path, *, count: int, length: int, tau: float = 1.0, seed: int = 42
    ) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.tokenizer = tiny_tokenizer("qwen")
        self.eos = self.tokenizer.token_to_id("<|im_end|>")
        self.count, self.length, self.tau, self.seed = count, length, tau, seed

    @torch.inference_mode()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0] / self.tau, dim=-1)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that ends in a full stop."""
        return self.tokenizer.encode(text if text[-1] in ".?" else f"{text}.").ids

    def sample(self, text: str, ids: list[int]) -> list[list[int]]:
        trajectories = []
        for number in range(self.count):
            key = draw_key(text_hash(text), seed=self.seed, kind="trajectory", number=number)
            said: list[int] = []
            for share in uniforms(key, self.length):
                sums = self.log_probs([*ids, *said])[-1].exp().double().cumsum(dim=0)
                said.append(int((sums / sums[-1] <= share).sum()))
                if said[-1] == self.eos:
                    break
            trajectories.append(said)
        return trajectories

    def score(self, ids: list[int], trajectory: list[int]) -> float:
        found = self.log_probs([*ids, *trajectory])
        places = range(len(ids) - 1, len(ids) + len(trajectory) - 1)
        own = [float(found[p, t]) for p, t in zip(places, trajectory, strict=True)]
        return sum(own) / len(own)

    def distance(self, left: str, right: str) -> float:
        texts = (left, right)
        prompts = [self.prompt(text) for text in texts]
        sampled = [self.sample(*pair) for pair in zip(texts, prompts, strict=True)]
        every = [*sampled[0], *sampled[1]]
        a, b = ([self.score(prompt, one) for one in every] for prompt in prompts)
        return float(np.linalg.norm(np.array(a) - np.array(b), ord=1))
