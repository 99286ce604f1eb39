"""The methods there are, as tables for people and for the docs; what a job makes of one."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from embedjob.config.interventions import given
from embedjob.config.job_file import DEFAULT, JobSource, read_yaml, recipe_from
from embedjob.config.recipe import Recipe
from embedjob.job.resolve import resolve
from embedjob.methods.catalogue import MethodFile, names, read_method

_HEADER = """\
# Methods

`encoder.method: NAME` in a job file takes one of these recipes; every key of the job file still
overrides it. `embedjob methods NAME` prints one, `embedjob methods NAME --resolved JOB.yaml` every
key with who set it. This page is made from the files in `embedjob/methods/` and the figures in
`docs/quality.yaml` by `embedjob.inspect.methods.page`; a test holds it to them.

"Needs" is what is done beside passes over the texts; none of these methods needs a fit. The last
column is Spearman x 100 of cosine against the score on STS-B dev, all 1,500 pairs, with
SmolLM2-135M-Instruct as it is, by `make bench-quality`; a dash is where that says nothing (the
method needs weights trained for it) or where the figure is still to be taken.{minilm}

| Method | Passes | Forward tokens per text | Needs | Attention | Default model \
| STS-B dev (SmolLM2) |
|---|---|---|---|---|---|---|
"""
_MINILM = "all-MiniLM-L6-v2"
_WRITING = """
## Writing one

A method is one YAML file; `method: path/to/file.yaml` takes any. A template is a string with one
`{text}`, and `{instruction}` and `{demonstrations}` if wanted, or a list of segments:

```yaml
templates:
  - join: separate                       # beside `template`; joint if left out, or if a bare list
    template:
      - {literal: "<s>Instruct:"}        # special tokens in it are parsed, in texts never
      - {instruction: {after: ","}}      # `after` is of the same piece
      - {literal: "\\nQuery:"}
      - {text: {max_tokens: 300}}        # a budget of its own, with join: separate
      - {literal: "\\nQuery again:"}
      - {text: {pool: true}}
      - {special: </s>, pool: true}      # one token, by its name
span: pooled                             # all segments with pool: true, or {tag: NAME, offset: 0}
```

Joint segments are tokenized as one string and their tokens found by character offsets; separate
ones each alone, as some authors do, which gives other ids at the seams. Where a text stands several
times its copies are cut alike, and `span: text` means the last. With `span: {rule: pooled, alone:
true}` as many last tokens count as the pooled segments have when they are tokenized by themselves.
`demonstrations` are strings, or `{text, answer}` written by the pattern in `demonstration`; with
`demonstrations_count: false` they are over and above `max_tokens`. `word_cut: 400` drops whole
words of a text that has more than 400 tokens, before all else. Of special tokens, `bos: auto` is
what the tokenizer adds, `none` nothing, `literal` what every template itself begins with; `eos:
append` is added by id after the text is cut.

`span: after_prompt` leaves out as many tokens as stand before the text when they are tokenized
alone, which is how NV-Embed, INSTRUCTOR and sentence-transformers count. `pooling` may be a list,
whose vectors are put one after another: `first` and `last` are then tokens of the span. `heads`
follow the pooling of every view, in order and in float32: `{pooler: true}` is the model's own tanh
layer, `{dense: 2_Dense}` and `{layer_norm: 3_LayerNorm}` are modules that sentence-transformers
saved in the model folder, `{normalize: true}` scales between them. Each role (query,
document, symmetric) may have other keys. `adapters` belong to the method's `model`: a job that
names another model names its adapters too.

## Continuations

```yaml
templates: ['This sentence: "{text}" implies:']
heads: [{continuations: [" it is raining.", " somebody is hungry."]}]
aggregation: concat
finish: []
similarity: manhattan
```

The vector then holds one number per continuation, in order: the mean log-probability of its tokens
after the view (Liu et al., Meaning Representations from Trajectories in Autoregressive Models,
arXiv:2310.18348, with the same continuations for all texts in place of those sampled from each
pair). A text and its template are run once for all continuations. A continuation is tokenized with
its template, or alone with `join: separate`, and a long text is cut at the same place before each.
Continuations are yours to sample, for example from texts of the corpus that the model goes on with;
they decide the vectors as the model does. The key may also be written `anchors`.

## Beside the vector

```yaml
heads:
  - sparse_lm: {words: all, pooling: max, activation: relu, top_k: null, scale: null}
  - router: {scores: logits, join: column}
decode: {max_tokens: 10, until: '"'}     # the span is then the states of words said greedily
```

`sparse_lm` runs the language-model head over the span and writes, per row, `sparse_indices`
(ascending ids of the model's vocabulary) and `sparse_values`: log(1 + relu(logit)), the largest or
the `sum` over the span; `log1p_relu` takes the logarithm twice. `words: text` keeps only the ids of
the text's own words without English stopwords (the ten heaviest of all where it has none), `top_k`
the heaviest, and `scale` makes whole numbers: rint(scale x value). Zeros are left out. Only then is
the head of the model loaded. `router` writes what the routers of a mixture of experts gave each
expert in every layer, averaged over the span and the views, as the column `router`, or with
`join: concat` as the last dimensions of the embedding. All of these read the last layer; sparse
weights and decoding go with one template. The embedding is always written: of a purely sparse model
it is the mean state, which also lets a later run prove that its model is the same. `similarity:
{embedding: dot, weight: 0.5, sparse: 0.5, minmax: true}` records in every file's footer how two
rows compare by both (`embedjob.weighted_sum`; the embedding's own measure stays
`embedjob.similarity`), and `router: 1.0` likewise; the sum itself is the reader's to make. The
vocabulary's size is in each file's footer (`embedjob.vocabulary`). Queries:
`Encoder.outputs(texts, role="query")` gives `embeddings`, `sparse` and `routers`; two sparse
vectors are compared by their dot product.
"""


def show_methods(console: Console) -> None:
    """Prints a line for each method."""
    table = Table("method", "paper", "forward tokens", "good for", box=None)
    for name in names():
        method = read_method(name)
        cited = method.citation
        first, *others = cited.authors.split(",")
        paper = f"{first}{' et al.' if others else ''} {cited.year}"
        table.add_row(name, paper, method.forward_tokens, method.good_for.strip())
    console.print(table)


def show_method(name: str, console: Console) -> None:
    """Prints what one method is, where it comes from, and its knobs."""
    method = read_method(name)
    model = method.model or "none published"
    console.print(f"[bold]{name}[/]: {method.summary.strip()}", highlight=False)
    console.print(_reference(method), highlight=False)
    good, licence = method.good_for.strip(), method.licence.strip()
    console.print(f"good for: {good}; default model: {model} ({licence})", highlight=False)
    for key, value in method.encoder.items():
        console.print(f"  {key}: {value!r}", highlight=False, markup=False)
    for role, values in (method.roles or {}).items():
        for key, value in values.items():
            console.print(f"  {role}: {key}: {value!r}", highlight=False, markup=False)


def page(quality: str | Path) -> str:
    """The text of docs/methods.md: a table of all methods, and a paragraph on each.

    `quality` is the file that `make bench-quality` writes.
    """
    methods = {name: read_method(name) for name in names()}
    figures = {name: f"{taken['spearman']:.2f}" for name, taken in read_yaml(quality).items()}
    rows = "".join(_row(name, method, figures.get(name, "-")) for name, method in methods.items())
    known = f" {_MINILM} has {figures[_MINILM]} there." if _MINILM in figures else ""
    header = _HEADER.replace("{minilm}", known)
    return header + rows + "".join(_paragraph(n, m) for n, m in methods.items()) + _WRITING


def resolved_lines(source: JobSource) -> list[str]:
    """Return every key of the resolved job with its value and who set it, one to a line."""
    resolved = resolve(source)
    lines = []
    for section, values in resolved.config.model_dump(mode="json").items():
        if not isinstance(values, dict):
            lines.append(f"{section}: {values}  # {resolved.origins.get(section, DEFAULT)}")
            continue
        for key, value in values.items():
            origin = resolved.origins.get(f"{section}.{key}", DEFAULT)
            lines.append(f"{section}.{key}: {value}  # {origin}")
    return lines


def _row(name: str, method: MethodFile, figure: str) -> str:
    recipe = recipe_from({"model": method.model or "-", **method.encoder}, {})
    attention = recipe.attention if "attention" in method.encoder else "the model's own"
    model = f"`{method.model}`" if method.model else "yours"
    needs = "greedy decoding" if recipe.decode else "-"
    tokens = method.forward_tokens
    cells = (f"[{name}](#{name})", _passes(recipe), tokens, needs, attention, model, figure)
    return f"| {' | '.join(cells)} |\n"


def _passes(recipe: Recipe) -> str:
    """How often a text goes through the model, in whole and in part."""
    whole = str(recipe.views)
    if blocks := sum(one.kind.extra_blocks(one.settings) for one in given(recipe.interventions)):
        return f"{whole} + {blocks} blocks"
    if recipe.decode is not None:
        # The pass over the prompt predicts the first token.
        return f"{whole} + up to {recipe.decode.max_tokens - 1} of one token"
    return whole


def _paragraph(name: str, method: MethodFile) -> str:
    roles = ", ".join(method.roles or ())
    apart = f" Its own keys for: {roles}." if roles else ""
    return (
        f"\n### {name}\n\n{method.summary.strip()}{apart} Good for {method.good_for.strip()}."
        f" Weights: {method.licence.strip()}. {_reference(method)}\n"
    )


def _reference(method: MethodFile) -> str:
    cited = method.citation
    arxiv = f", arXiv:{cited.arxiv}" if cited.arxiv else ""
    return f"{cited.authors.strip()}. {cited.title.strip()}. {cited.year}{arxiv}."
