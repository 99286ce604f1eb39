"""The ids that every method's authors feed to their model, and the positions that they pool.

Each function is the tokenization of one repository, written out as its code runs it, on a tokenizer
of transformers; the file is named beside it. Nothing of the library is used here, or ids would be
compared with themselves. `python -m tests.methods.authors` writes golden_authors.json anew, which
`test_golden_ids.py` holds both this file and the library to.
"""

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.fakes import tiny_tokenizer
from tests.methods.references import COT, EOL, KE, META

GOLDEN = Path(__file__).with_name("golden_authors.json")
TEXTS = (
    "A man is playing a guitar.",
    "a",
    'She said "no" \N{EM DASH} don\'t you think?',
    " two  blanks ",
    "line\nbreak\ttab",
    "naïve café owners in Zürich",
    "日本語の文章もここにあります。",
    "In 2024 there were 1,234 reports; 78% were read",
    "{x} _y_ *sent_1* {{text}} 'quoted'",
    "how do I get funding for my web based startup idea? " * 2,
)
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
Rows = list[tuple[list[int], list[int]]]
Procedure = Callable[[PreTrainedTokenizerFast, str], Rows]


@dataclass(frozen=True)
class Case:
    """A method in a role, the families of its models' tokenizers, and its authors' procedure.

    `tokens` are those that its models have more, and `ends` says that they put EOS last themselves.
    """

    method: str
    role: str
    families: tuple[str, ...]
    procedure: Procedure
    tokens: tuple[str, ...] = ()
    ends: bool = False


def auto(family: str, tokens: Sequence[str], *, ends: bool) -> PreTrainedTokenizerFast:
    """What AutoTokenizer loads for a model of that family."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.add_special_tokens(list(tokens))
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
        )
    names = {
        "bos_token": next((n for n in ("<s>", "<|begin_of_text|>") if _has(tokenizer, n)), None),
        "eos_token": next((n for n in ("</s>", "<|endoftext|>") if _has(tokenizer, n)), None),
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _has(tokenizer: Any, name: str) -> bool:
    return tokenizer.token_to_id(name) is not None


def _all(ids: list[int]) -> list[int]:
    return list(range(len(ids)))


# --- encoders ---


def whole(prefix: str = "", *, most: int = 512, cls: bool = False) -> Procedure:
    """sentence_transformers/models/Transformer.py, simcse/tool.py, e5/utils.py: prefix + text."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        ids = tokenizer(prefix + text, truncation=True, max_length=most)["input_ids"]
        return [(ids, [0] if cls else _all(ids))]

    return procedure


def instructor(instruction: str) -> Procedure:
    """InstructorEmbedding/instructor.py, `tokenize`: both stripped, joined by nothing."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        pair = [instruction.strip(), text.strip()]
        ids = tokenizer("".join(pair), truncation="longest_first", max_length=512)["input_ids"]
        own = tokenizer(pair[0], truncation="longest_first", max_length=512)["input_ids"]
        return [(ids, _all(ids)[len(own) - 1 :])]

    return procedure


# --- trained language models ---


def e5_mistral(prefix: str) -> Procedure:
    """The model card: max_length - 1, no padding; `input_ids + [tokenizer.eos_token_id]`."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        ids = tokenizer(prefix + text, max_length=4096 - 1, truncation=True)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        return [(ids, [len(ids) - 1])]

    return procedure


def qwen3_embedding(prefix: str) -> Procedure:
    """examples/qwen3_embedding_transformers.py; the tokenizer itself puts <|endoftext|> last."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        ids = tokenizer(prefix + text, truncation=True, max_length=8192 - 1)["input_ids"]
        ids = [*ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        return [(ids, [len(ids) - 1])]

    return procedure


def repllama(prefix: str) -> Procedure:
    """examples/repllama/data.py: `prepare_for_model(text + [eos])`, text cut to max_len - 3."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        inside = tokenizer(
            prefix + text, add_special_tokens=False, max_length=512 - 3, truncation=True
        )["input_ids"]
        ids = [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
        return [(ids, [len(ids) - 1])]

    return procedure


def llm2vec(instruction: str, header: str, footer: str) -> Procedure:
    """llm2vec/llm2vec.py, `_convert_to_str`, `prepare_for_tokenization` and `tokenize`."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        said = f"{instruction.strip()} !@#$%^&*(){text}" if instruction else f"!@#$%^&*(){text}"
        parts = f"{header}{said.strip()}{footer}".split("!@#$%^&*()")
        ids = tokenizer("".join(parts), truncation=True, max_length=512)["input_ids"]
        alone = tokenizer(parts[1], add_special_tokens=False)["input_ids"]
        return [(ids, _all(ids)[len(ids) - len(alone) :])]

    return procedure


def gritlm(instruction: str) -> Procedure:
    """gritlm/gritlm.py, `encode`: instruction tokens, BOS included, are masked by their count."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        before = f"<|user|>\n{instruction}\n<|embed|>\n" if instruction else "<|embed|>\n"
        ids = tokenizer(before + text, truncation=True, max_length=512)["input_ids"]
        own = tokenizer(before, truncation=True, max_length=512)["input_ids"]
        return [(ids, _all(ids)[len(own) :])]

    return procedure


def nv_embed(task: str) -> Procedure:
    """modeling_nvembed.py, `encode` and `prepare_kwargs_from_batch`: len(tokenize(instruction))."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        instruction = f"Instruct: {task}\nQuery: " if task else ""
        said = instruction + text + tokenizer.eos_token
        ids = tokenizer(said, max_length=32768, truncation=True)["input_ids"]
        left_out = len(tokenizer.tokenize(instruction)) if instruction else 0
        return [(ids, _all(ids)[left_out:])]

    return procedure


def llara(suffix: str) -> Procedure:
    """research/LLARA, README: prefix with BOS, text alone, suffix less its own BOS."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        inside = tokenizer(text, max_length=512, truncation=True, add_special_tokens=False)
        ids = tokenizer('"')["input_ids"] + inside["input_ids"] + tokenizer(suffix)["input_ids"][1:]
        return [(ids, _all(ids)[-8:])]

    return procedure


def bge_en_icl(task: str, examples: Sequence[tuple[str, str]] = ()) -> Procedure:
    """FlagEmbedding/inference/embedder/decoder_only/icl.py, `encode_queries_single_device`."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        shown = [f"<instruct>{task}\n<query>{q}\n<response>{a}" for q, a in examples]
        prefix, suffix = "\n\n".join(shown) + "\n\n" if shown else "", "\n<response>"
        ends = [
            tokenizer(end, add_special_tokens=False)["input_ids"]
            for end in ("<s>", f"{suffix}</s>")
        ]
        inputs = tokenizer(
            [f"<instruct>{task}\n<query>{text}"],
            max_length=512 - len(ends[0]) - len(ends[1]),
            truncation=True,
            add_special_tokens=False,
        )
        sizes = [
            len(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in (prefix, suffix)
        ]
        most = (sum(sizes) + 512 + 8) // 8 * 8 + 8
        [said] = tokenizer.batch_decode(inputs["input_ids"])
        ids = tokenizer(prefix + said + suffix, max_length=most, truncation=True)["input_ids"]
        return [(ids, [len(ids) - 1])]

    return procedure


def last_of_bare(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
    """The same file, `encode_corpus`: the bare text, whose EOS the tokenizer puts last."""
    ids = tokenizer(text, max_length=512, truncation=True)["input_ids"]
    return [(ids, [len(ids) - 1])]


def autoregembed(template: str) -> Procedure:
    """eval/eval_autoregembed.py: five ids right after the last token of each row."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        ids = tokenizer(template.replace("{}", text), truncation=True, max_length=512)["input_ids"]
        ids = ids + [tokenizer.convert_tokens_to_ids(f"<EMBED{n}>") for n in range(5)]
        return [(ids, _all(ids)[-5:])]

    return procedure


# --- language models as they are ---


def echo(*pieces: str, prompt: str = "") -> Procedure:
    """echo_embeddings.py, `EchoParser`: each piece alone; `{!x}` is read and not pooled."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        ids: list[int] = []
        pooled: list[int] = []
        for piece in pieces:
            said = piece.strip("{}").removeprefix("!") if piece.startswith("{") else piece
            said = said.replace("%%prompt%%", prompt).replace("%%text%%", text)
            found = tokenizer(said, add_special_tokens=False, truncation=True, max_length=300)
            first = len(ids)
            ids = ids + found["input_ids"]
            if piece.startswith("{") and not piece.startswith("{!"):
                pooled += range(first, len(ids))
        return [(ids, pooled)]

    return procedure


def eol(*templates: str, slot: str | None = None) -> Procedure:
    """evaluation.py of PromptEOL and its followers, `batcher`: cleaned, `*sent_0*` filled in."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        if slot is not None:
            tokenizer.add_tokens([slot])
        if len(text) > 0 and text[-1] not in ".?\"'":
            text += "."
        text = text.replace('"', "'")
        if len(text) > 0 and text[-1] == "?":
            text = text[:-1] + "."
        rows = []
        for template in templates:
            template = template.replace("_", " ").replace("*sent 0*", "*sent_0*")
            ids = tokenizer(template.replace("*sent_0*", text).strip())["input_ids"]
            rows.append((ids, [len(ids) - 1]))
        return rows

    return procedure


def geneol(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
    """geneol/geneol.py: a literal <s>, KE and the sentence as it is; the tail is pooled."""
    said = "<s>" + KE.replace("*sent_0*", text)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    offsets = tokenizer(said, add_special_tokens=False, return_offsets_mapping=True)
    tail = said.rindex("means in one word") + len("means in one word")
    pairs = enumerate(offsets["offset_mapping"])
    return [(ids, [place for place, (_, stop) in pairs if stop > tail])]


def moee(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
    """moee.py, `encode`: `!` may end a text, and `_` is replaced in the text too."""
    if len(text) > 0 and text[-1] not in ".?!\"'":
        text += "."
    said = EOL.replace("*sent_0*", text.replace('"', "'")).replace("_", " ").strip()
    ids = tokenizer(said)["input_ids"]
    return [(ids, [len(ids) - 1])]


# Each backslash-n is two characters, as in the authors' files.
_SYSTEM = (
    r"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an AI assistant that"
    r" can understand human language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
_ANSWER = r"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nThe "
_ONE = (
    '". Use one word to represent the {} in a retrieval task. Make sure your word is in lowercase.'
    f'{_ANSWER}word is: "'
)
_THREE = (
    '". Use three words to represent the {} in a retrieval task. Make sure your words are in'
    f' lowercase and split them by space.{_ANSWER}words are: "'
)


def promptreps(before: str, after: str) -> Procedure:
    """encode.py and dataset.py: prefix ids + text ids + suffix ids."""

    def procedure(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
        first, last = (
            tokenizer.encode(piece, add_special_tokens=False) for piece in (_SYSTEM + before, after)
        )
        inside = tokenizer.encode(
            text.strip(), add_special_tokens=False, truncation=True, max_length=512
        )
        ids = first + inside + last
        return [(ids, [len(ids) - 1])]

    return procedure


SPM = ("llama", "mistral")
PLAIN = (*SPM, "llama3", "qwen", "opt")
ICL = ("<instruct>", "<query>", "<response>")
S = tuple(f"<s{n}>" for n in range(1, 17))
EMBEDS = tuple(f"<EMBED{n}>" for n in range(5))
HEADER = ("<|end_header_id|>",)
RETRIEVE = "Retrieve semantically similar text"
_FOUR = ("[INST] ", " [/INST]")
_WORD = '". Use one word to represent the {} in a retrieval task. The word is: “'
_TAILS = ("can be described in one word", "has as its topic, in one word", "has the title")
_QUERY = ("<s>Instruct:", "{!%%prompt%%,}", "\nQuery:", "{!%%text%%}", "\nQuery again:")
_TASK = "Instruct: {}\nQuery: "
_SLOTTED = EOL.replace('"*sent', '<PST> "*sent')

# What was sampled, in place of a sample.
TRAJECTORY = (11, 5, 300)


def trajectories(tokenizer: PreTrainedTokenizerFast, text: str) -> Rows:
    """text2text_main.py: a full stop, `tokenizer(text)`; utils.py puts the trajectory after it."""
    if text[-1] not in string.punctuation:
        text += "."
    ids = tokenizer(text)["input_ids"]
    whole = [*ids, *TRAJECTORY]
    return [(whole, [*range(len(ids) - 1, len(whole))])]


CASES: tuple[Case, ...] = (
    Case("trajectories", "document", ("llama", "qwen", "gpt2"), trajectories),
    *(
        Case(name, "document", ("bert",), whole(most=most, cls=cls))
        for name, most, cls in (
            ("bert_cls", 512, True),
            ("bert_mean", 512, False),
            ("bert_first_last", 512, False),
            ("bert_whitening", 64, False),
            ("bert_flow", 64, False),
            ("mean", 512, False),
            ("sbert", 128, False),
            ("simcse_unsup", 128, True),
            ("simcse_sup", 128, True),
            ("gte", 512, False),
            ("bge", 512, True),
            ("splade", 512, False),
        )
    ),
    Case(
        "bge",
        "query",
        ("bert",),
        whole("Represent this sentence for searching relevant passages: ", cls=True),
    ),
    Case("e5", "document", ("bert",), whole("passage: ")),
    Case("e5", "query", ("bert",), whole("query: ")),
    Case("e5", "symmetric", ("bert",), whole("query: ")),
    Case("e5_instruct", "document", ("xlmr",), whole()),
    Case("e5_instruct", "query", ("xlmr",), whole(_TASK.format(SEARCH))),
    Case("e5_instruct", "symmetric", ("xlmr",), whole(_TASK.format(f"{RETRIEVE}."))),
    Case("instructor", "document", ("t5",), instructor("Represent the document for retrieval:")),
    Case(
        "instructor",
        "query",
        ("t5",),
        instructor("Represent the question for retrieving supporting documents:"),
    ),
    Case("instructor", "symmetric", ("t5",), instructor("Represent the sentence:")),
    Case("e5_mistral", "document", SPM, e5_mistral("")),
    Case("e5_mistral", "query", SPM, e5_mistral(_TASK.format(SEARCH))),
    Case("e5_mistral", "symmetric", SPM, e5_mistral(_TASK.format(f"{RETRIEVE}."))),
    Case("qwen3_embedding", "document", ("qwen",), qwen3_embedding("")),
    Case("qwen3_embedding", "query", ("qwen",), qwen3_embedding(f"Instruct: {SEARCH}\nQuery:")),
    Case(
        "qwen3_embedding", "symmetric", ("qwen",), qwen3_embedding(f"Instruct: {RETRIEVE}\nQuery:")
    ),
    Case("repllama", "document", SPM, repllama("passage: ")),
    Case("repllama", "query", SPM, repllama("query: ")),
    Case("llm2vec", "document", SPM, llm2vec("", *_FOUR)),
    Case("llm2vec", "query", SPM, llm2vec(f"{SEARCH}:", *_FOUR)),
    Case("llm2vec", "symmetric", SPM, llm2vec(f"{RETRIEVE}:", *_FOUR)),
    Case("gritlm", "document", SPM, gritlm("")),
    Case("gritlm", "query", SPM, gritlm(SEARCH)),
    Case("gritlm", "symmetric", SPM, gritlm(f"{RETRIEVE}.")),
    Case("nv_embed", "document", SPM, nv_embed("")),
    Case(
        "nv_embed",
        "query",
        SPM,
        nv_embed("Given a question, retrieve passages that answer the question"),
    ),
    Case("nv_embed", "symmetric", SPM, nv_embed(RETRIEVE)),
    *(
        Case(
            "llara",
            role,
            SPM,
            llara(f'", {asked} within eight words: {"".join(tokens)}'),
            tokens=S,
        )
        for role, asked, tokens in (
            ("document", "summarize the above passage", S[:8]),
            ("symmetric", "summarize the above passage", S[:8]),
            ("query", "predict the following passage", S[8:]),
        )
    ),
    Case("bge_en_icl", "document", ("llama",), last_of_bare, ICL, True),
    Case("bge_en_icl", "query", ("llama",), bge_en_icl(f"{SEARCH}."), ICL, True),
    Case("bge_en_icl", "symmetric", ("llama",), bge_en_icl(f"{RETRIEVE}."), ICL, True),
    Case(
        "autoregembed",
        "document",
        SPM,
        autoregembed('Passage: "{}' + _WORD.replace("{}", "passage")),
        EMBEDS,
    ),
    Case(
        "autoregembed",
        "query",
        SPM,
        autoregembed('Query: "{}' + _WORD.replace("{}", "query")),
        EMBEDS,
    ),
    Case(
        "autoregembed",
        "symmetric",
        SPM,
        autoregembed("{}\nThis sentence means in one word: “"),
        EMBEDS,
    ),
    Case(
        "echo_finetuned",
        "document",
        SPM,
        echo("<s>Document:", "{!%%text%%}", "\nDocument again:", "{%%text%%}", "{</s>}"),
    ),
    Case("echo_finetuned", "query", SPM, echo(*_QUERY, "{%%text%%}", "{</s>}", prompt=SEARCH)),
    Case(
        "echo_finetuned",
        "symmetric",
        SPM,
        echo(*_QUERY, "{%%text%%}", "{</s>}", prompt=f"{RETRIEVE}."),
    ),
    Case(
        "echo",
        "document",
        SPM,
        echo("<s>", "Query:", "{!%%text%%}", "\nQuery again:", "{%%text%%}"),
    ),
    Case(
        "echo_rewrite",
        "document",
        SPM,
        echo(
            "<s>",
            "Rewrite the following paragraph: ",
            "{!%%text%%}",
            "\nThe rewritten paragraph: ",
            "{%%text%%}",
        ),
    ),
    Case("prompteol", "document", PLAIN, eol(EOL)),
    Case(
        "prompteol_icl",
        "document",
        PLAIN,
        eol(f'This sentence : "A jockey riding a horse." means in one word:"Equestrian".{EOL}'),
    ),
    Case("pretended_cot", "document", PLAIN, eol(COT)),
    Case("knowledge_enhanced", "document", PLAIN, eol(KE)),
    Case("cot_ke_mean", "document", PLAIN, eol(COT, KE)),
    Case("metaeol", "document", ("llama", "llama3"), eol(*META)),
    Case("geneol", "document", ("llama",), geneol),
    Case("token_prepending", "document", PLAIN, eol(_SLOTTED, slot="<PST>")),
    Case("contrastive_prompting", "document", PLAIN, eol(EOL)),
    Case(
        "text_first_views",
        "document",
        PLAIN,
        eol(*(f'This sentence : "*sent_0*" {tail}:"' for tail in _TAILS)),
    ),
    Case("moee", "document", ("gpt2", "qwen"), moee),
    *(
        Case(name, role, ("llama3",), promptreps(f'{what.title()}: "', after.format(what)), HEADER)
        for name, after in (("promptreps", _ONE), ("promptreps_multi", _THREE))
        for role, what in (("document", "passage"), ("query", "query"))
    ),
)


def name_of(case: Case, family: str) -> str:
    """The name of a case on a tokenizer in the pinned file."""
    return f"{case.method} {case.role} {family}"


def rows_of(case: Case, family: str) -> list[Rows]:
    """What the authors' procedure gives for each of the ten texts, view by view."""
    tokenizer = auto(family, case.tokens, ends=case.ends)
    return [case.procedure(tokenizer, text) for text in TEXTS]


def pinned() -> Iterator[tuple[str, list[list[str]]]]:
    """Each case, and per text and view its ids and which of them are pooled, for people and git."""
    for case in CASES:
        for family in case.families:
            rows = rows_of(case, family)
            yield name_of(case, family), [[written(*view) for view in views] for views in rows]


def written(ids: Sequence[int], pooled: Sequence[int]) -> str:
    """Ids and the pooled range, as text."""
    assert list(pooled) == list(range(pooled[0], pooled[-1] + 1))
    return f"{' '.join(map(str, ids))} | {pooled[0]}:{pooled[-1] + 1}"


def golden() -> Mapping[str, list[list[str]]]:
    """What is pinned."""
    found: dict[str, list[list[str]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(dict(pinned()), indent=0) + "\n", encoding="utf-8")
