"""What was measured of the methods, as tables of docs/methods.md, and what follows from it."""

import re
from collections.abc import Mapping
from textwrap import fill
from typing import Any

_FIGURES = """
## Figures

Every method that runs a language model as it is, with SmolLM2-135M-Instruct, by `make
bench-quality`: Spearman x 100 of cosine against the score, for texts that are compared with each
other. STS-B dev has 1,500 pairs. The authors of many prompts chose them on it, and these methods
look 7 to 17 points better there than on STS-B test. SICK-R dev has 500 pairs, on which nothing here
was chosen. Missing are `promptreps`, whose template is Llama-3's, and `moee`, which needs a mixture
of experts.

"Tokens" are those of all views of a text of SICK-R dev, on average; "computed" are those among them
that no view before has computed: what views begin with alike goes through the model once. "Time" is
that of a process with one thread on a CPU, beside other work, so that a quarter more or less says
nothing. A dash is a figure that is still to be taken, or of another model.

| Method | STS-B dev | SICK-R dev | Tokens | Computed | x mean | Time x mean |
|---|---|---|---|---|---|---|
"""
_GAINS = """
What a method adds to a cheaper one, for how many times its computed tokens and its time:

| Method | over | STS-B dev | SICK-R dev | Computed | Time |
|---|---|---|---|---|---|
"""
_ADVICE = """\
Both sets together say: with a small model as it is, take `knowledge_enhanced`. Its long beginning
is the same for every text, so that a text costs what it costs `prompteol`. `prompteol_icl`, whose
example was chosen on STS-B, is {prompteol_icl - knowledge_enhanced @ stsb.dev} on STS-B dev and
{prompteol_icl - knowledge_enhanced @ sickr.dev} on SICK-R dev against it. `text_first_views`,
chosen on STS-B train, is {text_first_views - prompteol_icl @ stsb.dev} and
{text_first_views - prompteol_icl @ sickr.dev} against one pass of `prompteol_icl`, and
{text_first_views - knowledge_enhanced @ stsb.dev} and
{text_first_views - knowledge_enhanced @ sickr.dev} against `knowledge_enhanced`, for twice the
computed tokens: worth it at most where texts are like those of STS-B. None of `prompteol_icl`,
`token_prepending` and `text_first_views` is above plain `prompteol` on SICK-R dev. With so few
pairs a point more or less may be chance. Where an encoder that was trained to embed will do, it is
better: all-MiniLM-L6-v2, a sixth of the size, is {all-MiniLM-L6-v2 - text_first_views @ stsb.dev}
and {all-MiniLM-L6-v2 - text_first_views @ sickr.dev} against `text_first_views`. With a model of
some billion parameters the order may be another: none was measured here.
"""
_SAMPLED = """
What generates or samples would take hours with all pairs, and is measured on 200 of STS-B dev that
a seed has drawn, beside two methods that do not (`python -m benchmarks.generated`, one thread). The
one model embeds, generates and samples. GenEOL averages a text with one text of each of its four
kinds under the prompt of `knowledge_enhanced`; `trajectories` compares by the L1 distance of its 40
continuations, pairwise by the distance of the paper (`embedjob score`), 20 continuations of each
text. "CPU seconds" are those of all 200 pairs, generation and sampling included.

| Method | 200 pairs of STS-B dev | CPU seconds |
|---|---|---|
"""
_RETRIEVAL = """
Retrieval (`python -m benchmarks.retrieval`): nDCG@10 of 300 test queries of SciFact, over the 283
documents that they judge and 500 others. TF-IDF has the vocabulary of these documents; PromptReps
is SmolLM2-135M-Instruct, 128 tokens of each text. What is sparse and dense together is the mean of
both scores, scaled from 0 to 1 for each query.

| Method | nDCG@10 | taken |
|---|---|---|
"""
# The dearer method, and the cheaper one that it must be worth more than.
COMPARED = (
    ("prompteol", "mean"),
    ("echo_rewrite", "mean"),
    ("knowledge_enhanced", "prompteol"),
    ("prompteol_icl", "prompteol"),
    ("token_prepending", "prompteol"),
    ("contrastive_prompting", "prompteol"),
    ("text_first_views", "prompteol_icl"),
    ("text_first_views", "knowledge_enhanced"),
    ("cot_ke_mean", "knowledge_enhanced"),
    ("metaeol", "knowledge_enhanced"),
)
AS_PUBLISHED = ", the paper's setting"
# What a figure's name ends in, where the vectors of a method were finished by a fit or weighted.
WHITENED, BY_FLOW, BY_IDF = ", whitened", ", flow", ", idf"
# What was generated of each text; the exact distance of pairs; what retrieval compares.
OF_FOUR, PAIRWISE, WITH_MINILM = ", m = 4", ", pairwise", ", with all-MiniLM-L6-v2"
DENSE, SPARSE, HYBRID = ", dense", ", sparse", ", hybrid"
FIGURE_VARIANTS = (
    *(AS_PUBLISHED, WHITENED, BY_FLOW, BY_IDF),
    *(OF_FOUR, PAIRWISE, WITH_MINILM, DENSE, SPARSE, HYBRID),
)
_COSTS = ("computed", "cpu_seconds")
_MINILM = "all-MiniLM-L6-v2"
_STSB, _SICKR, OF_PAIRS, _SCIFACT = "stsb.dev", "sickr.dev", "200 pairs", "scifact"
_NDCG = "ndcg_at_10"
_OfMethods = Mapping[str, Mapping[str, Any]]
Figures = Mapping[str, _OfMethods]


def figures_chapter(figures: Figures) -> str:
    """Return the table of what was measured, best first."""
    stsb, sickr = (figures.get(data) or {} for data in (_STSB, _SICKR))
    known = {**stsb, **sickr}
    best = sorted(known, key=lambda name: -float(stsb.get(name, known[name])["spearman"]))
    plain = sickr.get("mean")
    gains = "".join(
        _gain_row(dearer, cheaper, stsb, sickr)
        for dearer, cheaper in COMPARED
        if all(name in figures for name in (dearer, cheaper) for figures in (stsb, sickr))
    )
    table = "".join(_figure_row(name, stsb, sickr, plain) for name in best)
    chapter = _FIGURES + table + (gains and _GAINS + gains) + _advice(figures)
    return (
        chapter + _of_pairs(figures.get(OF_PAIRS) or {}) + _retrieved(figures.get(_SCIFACT) or {})
    )


def _of_pairs(taken: _OfMethods) -> str:
    """Return the table of what generates or samples; nothing where none was measured."""
    best = sorted(taken, key=lambda name: -float(taken[name]["spearman"]))
    rows = (
        f"| {name} | {taken[name]['spearman']:.2f} | {taken[name]['cpu_seconds']:,.0f} |\n"
        for name in best
    )
    return _SAMPLED + "".join(rows) if taken else ""


def _retrieved(taken: _OfMethods) -> str:
    """Return the table of retrieval; nothing where none was measured."""
    best = sorted(taken, key=lambda name: -float(taken[name][_NDCG]))
    rows = (f"| {name} | {taken[name][_NDCG]:.4f} | {taken[name]['date']} |\n" for name in best)
    return _RETRIEVAL + "".join(rows) if taken else ""


def _figure_row(
    name: str, stsb: _OfMethods, sickr: _OfMethods, plain: Mapping[str, Any] | None
) -> str:
    found = [f"{one[name]['spearman']:.2f}" if name in one else "-" for one in (stsb, sickr)]
    cost = ["-"] * 4
    if plain and name in sickr and name != _MINILM:  # another model, with another tokenizer
        own = sickr[name]
        times = (own[key] / plain[key] for key in _COSTS)
        counts = (f"{own[key]:.0f}" for key in ("tokens", "computed"))
        cost = [*counts, *(f"{one:.1f}" for one in times)]
    return f"| {' | '.join((name, *found, *cost))} |\n"


def _advice(figures: Figures) -> str:
    """Return what follows from the figures; nothing while a figure that it names is lacking."""

    def gain(match: re.Match[str]) -> str:
        better, worse, data = match.groups()
        return f"{figures[data][better]['spearman'] - figures[data][worse]['spearman']:+.1f}"

    try:
        text = re.sub(r"\{(\S+)\s-\s(\S+)\s@\s(\S+)\}", gain, _ADVICE.replace("\n", " "))
    except KeyError:
        return ""
    return f"\n{fill(text, width=100, break_on_hyphens=False)}\n"


def _gain_row(dearer: str, cheaper: str, stsb: _OfMethods, sickr: _OfMethods) -> str:
    gains = (
        f"{figures[dearer]['spearman'] - figures[cheaper]['spearman']:+.1f}"
        for figures in (stsb, sickr)
    )
    costs = (f"{sickr[dearer][key] / sickr[cheaper][key]:.1f}" for key in _COSTS)
    return f"| {' | '.join((dearer, cheaper, *gains, *costs))} |\n"
