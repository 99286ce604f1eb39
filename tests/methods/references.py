"""The methods as their authors' own code runs them: one text at a time, no padding, no sharing.

Nothing of the library is used here. Each reference gives, per view, the token ids and the pooled
positions, and the one vector of the text.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

MAX_LENGTH = 40  # what the settings give to methods that cut by the tokenizer
LLM2VEC_LENGTH = 512
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
STS = "Retrieve semantically similar text."
# As NV-Embed-v2's instructions.json and Qwen3-Embedding's evaluation code write it.
BARE_STS = "Retrieve semantically similar text"
# As the README and the evaluation of bge-en-icl write it.
ICL_SEARCH = f"{SEARCH}."
STOPWORDS = "the over a why she no i do for my in how"
EOL = 'This sentence : "*sent_0*" means in one word:"'
COT = 'After thinking step by step , this sentence : "*sent_0*" means in one word:"'
KE = (
    "The essence of a sentence is often captured by its main subjects and actions, while"
    " descriptive terms provide additional but less central details. With this in mind , this"
    ' sentence : "*sent_0*" means in one word:"'
)

# The eight prompts of MetaEOL, as its authors print them.
META = (
    (
        "In this task, you're presented with a text excerpt. Your task is to categorize the"
        " excerpt into a broad category such as 'Education', 'Technology', 'Health',"
        " 'Business', 'Environment', 'Politics', or 'Culture'. These categories help in"
        " organizing content for better accessibility and targeting. For this task, this"
        ' sentence : "*sent_0*" should be classified under one general category in one word:"'
    ),
    (
        "In this task, you're given a statement and you need to determine whether it's"
        " presenting an 'Opinion' or a 'Fact'. This distinction is vital for information"
        " verification, educational purposes, and content analysis. For this task, this"
        ' sentence : "*sent_0*" discriminates between opinion and fact in one word:"'
    ),
    (
        "In this task, you're given a review from an online platform. Your task is to"
        " generate a rating for the product based on the review on a scale of 1-5, where 1"
        " means 'extremely negative' and 5 means 'extremely positive'. For this task, this"
        ' sentence : "*sent_0*" reflects the sentiment in one word:"'
    ),
    (
        "In this task, you're reading a personal diary entry. Your task is to identify the"
        " predominant emotion expressed, such as joy, sadness, anger, fear, or love. For"
        ' this task, this sentence : "*sent_0*" conveys the emotion in one word:"'
    ),
    (
        "In this task, you're presented with two sentences. Your task is to assess whether"
        " the sentences convey the same meaning. Use 'identical', 'similar', 'different', or"
        " 'unrelated' to describe the relationship. To enhance the performance of this task,"
        ' this sentence : "*sent_0*" means in one word:"'
    ),
    (
        "In this task, you're given a sentence and a phrase. Your task is to determine if"
        " the phrase can be a contextual synonym within the given sentence. Options include"
        " 'yes', 'no', or 'partially'. To enhance the performance of this task, this"
        ' sentence : "*sent_0*" means in one word:"'
    ),
    (
        "In this task, you're examining a news article. Your task is to extract the most"
        ' critical fact from the article. For this task, this sentence : "*sent_0*"'
        ' encapsulates the key fact in one word:"'
    ),
    (
        "In this task, you're reviewing a scientific abstract. Your task is to identify the"
        " main entities (e.g., proteins, diseases) and their relations (e.g., causes,"
        ' treats). For this task, this sentence : "*sent_0*" highlights the primary entity'
        ' or relation in one word:"'
    ),
)


@dataclass(frozen=True)
class Expected:
    ids: list[list[int]]
    pooled: list[list[int]]
    vector: Tensor
    sparse: dict[int, float] | None = None
    router: Tensor | None = None


Reference = Callable[[Tokenizer, PreTrainedModel, str], Expected]


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    ids: list[int],
    *,
    both_ways: bool = False,
    embeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All hidden states [T, D] of one unpadded text."""
    kwargs: dict[str, Any] = {}
    if both_ways:  # an additive mask that hides nothing
        kwargs["attention_mask"] = torch.zeros(1, 1, len(ids), len(ids))
    given = torch.tensor([ids]) if embeds is None else None
    output = model(given, inputs_embeds=embeds, output_hidden_states=True, **kwargs)
    return tuple(state[0] for state in output.hidden_states)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def bert(
    prefix: str = "", *, cls: bool = False, first_last: bool = False, most: int = MAX_LENGTH
) -> Reference:
    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.enable_truncation(most)
        ids = tok.encode(prefix + text).ids
        hidden = run(model, ids)
        states = (hidden[1] + hidden[-1]) / 2 if first_last else hidden[-1]
        pooled = states[0] if cls else states.mean(dim=0)
        return Expected([ids], [[0] if cls else list(range(len(ids)))], unit(pooled))

    return reference


def simcse_sup(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
    tok.enable_truncation(MAX_LENGTH)
    ids = tok.encode(text).ids
    with torch.inference_mode():
        vector = model(torch.tensor([ids])).pooler_output[0]
    return Expected([ids], [[0]], unit(vector))


def instructor(instruction: str) -> Reference:
    """Both are stripped and joined by nothing; the mask counts the instruction's own tokens."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.enable_truncation(MAX_LENGTH)
        ids = tok.encode("".join([instruction.strip(), text.strip()])).ids
        left_out = len(tok.encode(instruction.strip()).ids) - 1  # all but </s>
        mean = run(model, ids)[-1][left_out:].mean(dim=0)
        dense = model.get_submodule("dense")
        return Expected([ids], [list(range(left_out, len(ids)))], unit(mean @ dense.weight.T))

    return reference


class LatentAttentionModel(torch.nn.Module):
    """NV-Embed's layer as its paper writes it, under the names that its checkpoints have."""

    def __init__(self, width: int, *, latents: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        self.latents = torch.nn.Parameter(torch.zeros(latents, width))
        attend, feed = torch.nn.Module(), torch.nn.Module()
        attend.norm, attend.norm_context = (torch.nn.LayerNorm(width) for _ in range(2))
        attend.fn = torch.nn.Module()
        attend.fn.to_q = torch.nn.Linear(width, inner, bias=False)
        attend.fn.to_kv = torch.nn.Linear(width, 2 * inner, bias=False)
        attend.fn.to_out = torch.nn.Linear(inner, width, bias=False)
        feed.norm, feed.fn = torch.nn.LayerNorm(width), torch.nn.Module()
        wide, narrow = torch.nn.Linear(width, 8 * width), torch.nn.Linear(4 * width, width)
        feed.fn.net = torch.nn.ModuleList([wide, torch.nn.Identity(), narrow])
        self.cross_attend_blocks = torch.nn.ModuleList([attend, feed])

    def forward(self, states: Tensor) -> Tensor:
        """Token by token, head by head."""
        attend, feed = self.cross_attend_blocks
        found = []
        for state in states:
            query = attend.fn.to_q(attend.norm(state)).chunk(self.heads)
            both = attend.fn.to_kv(attend.norm_context(self.latents))
            keys, values = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
            parts = [
                torch.softmax(k @ q / len(q) ** 0.5, dim=0) @ v
                for q, k, v in zip(
                    query, keys.chunk(self.heads, 1), values.chunk(self.heads, 1), strict=True
                )
            ]
            state = state + attend.fn.to_out(torch.cat(parts))
            value, gate = feed.fn.net[0](feed.norm(state)).chunk(2)
            found.append(state + feed.fn.net[2](value * torch.nn.functional.gelu(gate)))
        return torch.stack(found)


def nv_embed(instruction: str) -> Reference:
    """The mask zeroes as many places as the instruction has tokens, and the first one is BOS."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        before = f"Instruct: {instruction}\nQuery: " if instruction else ""
        ids = tok.encode(before + text + "</s>").ids
        left_out = len(tok.encode(before, add_special_tokens=False).ids) if before else 0
        states = run(model, ids, both_ways=True)[-1]
        with torch.inference_mode():
            mixed = model.get_submodule("latent_attention_model")(states)
        kept = list(range(left_out, len(ids)))
        return Expected([ids], [kept], unit(mixed[left_out:].mean(dim=0)))

    return reference


def last_of_eos(prefix: str, *, eos: str, most: int = MAX_LENGTH) -> Reference:
    """e5-mistral, Qwen3-Embedding: cut to max_length - 1, then the id of EOS."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.enable_truncation(most - 1)
        ids = [*tok.encode(prefix + text).ids, tok.token_to_id(eos)]
        return Expected([ids], [[len(ids) - 1]], unit(run(model, ids)[-1][-1]))

    return reference


def repllama(prefix: str) -> Reference:
    """Cut to max_length - 3 before BOS and EOS, which leaves one place unused."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.enable_truncation(MAX_LENGTH - 3)
        middle = tok.encode(prefix + text, add_special_tokens=False).ids
        ids = [tok.token_to_id("<s>"), *middle, tok.token_to_id("</s>")]
        return Expected([ids], [[len(ids) - 1]], unit(run(model, ids)[-1][-1]))

    return reference


def llm2vec(instruction: str, header: str, footer: str) -> Reference:
    """What comes after the separator is tokenized alone, and so many last tokens are pooled.

    Before that whole words are dropped, a share of them at a time; counting stops at max_length.
    """

    def count_of(tok: Tokenizer, text: str) -> int:
        return min(LLM2VEC_LENGTH, len(tok.encode(text, add_special_tokens=False).ids))

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        length = count_of(tok, text)
        while length > 400:
            reduced_length = int(len(text.split()) * (400 / length))
            text = " ".join(text.split()[:reduced_length])
            length = count_of(tok, text)
        whole = f"{instruction.strip()} !@#$%^&*(){text}" if instruction else f"!@#$%^&*(){text}"
        # Without a chat format nothing is stripped.
        parts = (header + (whole.strip() if header else whole) + footer).split("!@#$%^&*()")
        ids = tok.encode("".join(parts)).ids
        count = len(tok.encode(parts[1], add_special_tokens=False).ids)
        kept = list(range(len(ids) - count, len(ids)))
        return Expected([ids], [kept], run(model, ids, both_ways=True)[-1][-count:].mean(dim=0))

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
    """Instruction and query are cut alone, decoded, and tokenized with what is around them."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        shown = [f"<instruct>{task}\n<query>{q}\n<response>{r}" for q, r in examples]
        prefix = "\n\n".join(shown) + "\n\n" if shown else ""
        bos, suffix = (
            tok.encode(one, add_special_tokens=False).ids for one in ("<s>", "\n<response></s>")
        )
        query = tok.encode(f"<instruct>{task}\n<query>{text}", add_special_tokens=False).ids
        said = tok.decode(query[: 512 - len(bos) - len(suffix)], skip_special_tokens=False)
        ids = tok.encode(f"{prefix}{said}\n<response>").ids
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


def autoregembed(template: str) -> Reference:
    """Five tokens come right after the last one of the text in its template."""

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        ids = tok.encode(template.format(text)).ids
        ids += [tok.token_to_id(f"<EMBED{n}>") for n in range(5)]
        states = run(model, ids)[-1]
        last = list(range(len(ids) - 5, len(ids)))
        return Expected([ids], [last], unit(states[-5:].mean(dim=0)))

    return reference


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


def geneol(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
    """GenEOL's embedding of a text beside which nothing was generated."""
    return geneol_beside(())(tok, model, text)


def geneol_beside(generated: Sequence[str]) -> Reference:
    """geneol/geneol.py: text and generations under the KE prompt, uncleaned; plain mean of all.

    Of each, the mean state of the tokens after `means in one word`.
    """

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        rows, pooled, vectors = [], [], []
        for sentence in (text, *generated):
            prompt = KE.replace("*sent_0*", sentence)
            encoding = tok.encode(prompt)
            tail = prompt.rindex("means in one word") + len("means in one word")
            places = [n for n, (_, stop) in enumerate(encoding.offsets) if stop > tail]
            rows.append(encoding.ids)
            pooled.append(places)
            vectors.append(run(model, encoding.ids)[-1][places].mean(dim=0))
        return Expected(rows[:1], pooled[:1], unit(torch.stack(vectors).mean(dim=0)))

    return reference


def word_tokenize(text: str) -> list[str]:
    """nltk's own, where Punkt has met no text and so knows no abbreviation."""
    nltk = pytest.importorskip("nltk.tokenize")
    words = nltk.NLTKWordTokenizer()
    return [w for one in nltk.PunktSentenceTokenizer().tokenize(text) for w in words.tokenize(one)]


def of_words(tok: Tokenizer, logits: Tensor, text: str) -> dict[int, float]:
    """The authors' get_valid_tokens_values; the stopwords are those in the texts of the tests."""
    stopwords = {*STOPWORDS.split(), *string.punctuation}
    token_ids: set[int] = set()
    for word in [w for w in word_tokenize(text.lower()) if w not in stopwords]:
        token_ids.update(tok.encode(word, add_special_tokens=False).ids)
    values = torch.log(1 + torch.relu(logits))
    inside = torch.tensor(list(token_ids))
    if len(inside) == 0:
        top, where = values.topk(10)
    else:
        top, where = values[inside].topk(min(len(inside), 128))
        where = inside[where]
    kept = zip(where.tolist(), np.rint(top.numpy() * 100).tolist(), strict=True)
    return {token: value for token, value in kept if value}


def promptreps(prefix: str, suffix: str, *, words: int = 0, until: str = '"') -> Reference:
    @torch.inference_mode()
    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        before, inside, after = (
            tok.encode(piece, add_special_tokens=False).ids
            for piece in (prefix, text.strip(), suffix)
        )
        ids = before + inside[:512] + after
        said, states, logits = list(ids), [], []
        for _ in range(words or 1):
            output = model(torch.tensor([said]), output_hidden_states=True)
            token = int(output.logits[0, -1].argmax())
            if words and states and until in tok.decode([token], skip_special_tokens=False):
                break
            states.append(output.hidden_states[-1][0, -1])
            logits.append(output.logits[0, -1])
            if until in tok.decode([token], skip_special_tokens=False):
                break
            said.append(token)
        largest = torch.stack(logits).max(dim=0).values
        sparse = of_words(tok, largest, text.strip())
        return Expected([ids], [[len(ids) - 1]], unit(torch.stack(states).mean(dim=0)), sparse)

    return reference


@torch.inference_mode()
def moee(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
    if len(text) > 0 and text[-1] not in ".?!\"'":
        text += "."
    template = 'This sentence : "*sent 0*" means in one word:"'
    prompt = template.replace("*sent 0*", text.replace('"', "'")).replace("_", " ").strip()
    ids = tok.encode(prompt).ids
    output = model(torch.tensor([ids]), output_hidden_states=True, output_router_logits=True)
    scores = torch.cat([layer[-1] for layer in output.router_logits])
    state = unit(output.hidden_states[-1][0, -1])
    return Expected([ids], [[len(ids) - 1]], state, router=scores)


@torch.inference_mode()
def splade(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
    tok.enable_truncation(MAX_LENGTH)
    ids = tok.encode(text).ids
    output = model(torch.tensor([ids]), output_hidden_states=True)
    weights = torch.log1p(torch.relu(output.logits[0])).max(dim=0).values
    sparse = {token: float(weights[token]) for token in weights.nonzero()[:, 0].tolist()}
    vector = unit(output.hidden_states[-1][0].mean(dim=0))
    return Expected([ids], [list(range(len(ids)))], vector, sparse)


def token_prepending(start: int, stop: int, *, row: int | str, layer: int) -> Reference:
    """A row more in the embedding matrix; before the blocks its state is the last token's.

    The row is drawn by a seed, or a copy of that of a token.
    """

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        tok.add_tokens(["<PST>"])
        prompt = f'This sentence : <PST> "{clean(text)}" means in one word:"'.strip()
        ids = tok.encode(prompt).ids
        slot = ids.index(tok.token_to_id("<PST>"))
        table = model.get_input_embeddings().weight.detach()
        if isinstance(row, str):
            [ids[slot]] = tok.encode(row, add_special_tokens=False).ids
            extra = table[ids[slot]]
        else:
            extra = torch.tensor(np.random.RandomState(row).randn(table.shape[1])).float()
        table = torch.cat([table, extra[None]])
        known = [len(table) - 1 if i == slot else one for i, one in enumerate(ids)]
        states = table[known][None]
        for block in model.layers[start:stop]:
            block.forward = _prepended(block.forward, slot)
        try:
            hidden = run(model, ids, embeds=states)
        finally:
            for block in model.layers[start:stop]:
                del block.forward
        return Expected([ids], [[len(ids) - 1]], unit(hidden[layer][-1]))

    return reference


def _prepended(forward: Callable[..., Tensor], slot: int) -> Callable[..., Tensor]:
    def changed(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        states = states.clone()
        states[0, slot] = states[0, -1]
        return forward(states, *args, **kwargs)

    return changed


def contrastive(block: int, alpha: float | None, *, layer: int) -> Reference:
    """Two whole runs; without an alpha the difference is brought to the norm of what was there."""
    irrelevant = 'The irrelevant information of this sentence : "*sent_0*" means in one word:"'

    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        prompts = [t.replace("*sent_0*", clean(text)).strip() for t in (irrelevant, EOL)]
        auxiliary, ids = (tok.encode(prompt).ids for prompt in prompts)
        projection = model.layers[block].self_attn.o_proj
        forward, seen = projection.forward, []

        def change(values: Tensor) -> Tensor:
            seen.append(values[0, -1].clone())
            if len(seen) == 2:
                left = seen[1] - seen[0]
                factor = seen[1].norm() / left.norm() if alpha is None else alpha
                values = values.clone()
                values[0, -1] = factor * left
            return forward(values)

        projection.forward = change
        try:
            run(model, auxiliary)
            hidden = run(model, ids)
        finally:
            del projection.forward
        return Expected([ids], [[len(ids) - 1]], unit(hidden[layer][-1]))

    return reference


def trajectories(*continuations: tuple[int, ...]) -> Reference:
    """utils.py, `get_logprobs`: the mean log-probability of each continuation's own tokens."""

    @torch.inference_mode()
    def reference(tok: Tokenizer, model: PreTrainedModel, text: str) -> Expected:
        prompt = tok.encode(fullstop(text) if text else text).ids
        views = [[*prompt, *one] for one in continuations]
        means = []
        for ids in views:
            found = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            own = [found[at - 1, ids[at]] for at in range(len(prompt), len(ids))]
            means.append(torch.stack(own).mean())
        pooled = [[*range(len(prompt) - 1, len(ids))] for ids in views]
        return Expected(views, pooled, torch.stack(means))

    return reference


def fullstop(text: str) -> str:
    """The cleaning of the trajectories paper, which fails on an empty text."""
    return text if text[-1] in string.punctuation else text + "."
