"""The page of all methods for the docs, docs/methods.md."""

from pathlib import Path

from embedjob.config.interventions import given
from embedjob.config.job import Generate
from embedjob.config.job_file import read_yaml, recipe_from, validate
from embedjob.config.recipe import Recipe
from embedjob.methods.catalogue import MethodFile, names, read_method
from embedjob.reports.method_figures import figures_chapter

_HEADER = """\
# Methods

`encoder.method: NAME` in a job file takes one of these recipes; every key of the job file still
overrides it. `embedjob methods NAME` prints one, `embedjob methods NAME --resolved JOB.yaml` every
key with who set it. This page is made from the files in `embedjob/methods/` and the figures in
`docs/quality.yaml` by `embedjob.reports.method_pages.page`; a test holds it to them.

A method file is its paper's: the knobs are those of the authors, and what differs from their code
is said. Two things differ everywhere: a special token that is spelled in a text is text here, and
vectors have unit length where authors keep raw states and compare them by cosine. What was chosen
for one model, by the authors or by us, stands in the file under that model's name in `for_models`,
and no other model gets it. A model is recognised by values of its `config.json`, so that it is the
same model on the hub, in a folder and in a GGUF file; a model trained further from it that kept
these values counts as it. `--resolved` says which model a method takes yours for.

"Needs" is what is done beside passes over the texts, generated ones too: fits are made once for an
output, before its first vector.

| Method | Passes | Forward tokens per text | Needs | Attention | Default model |
|---|---|---|---|---|---|
"""
_WRITING = """
## Writing one

A method is one YAML file; `method: path/to/file.yaml` takes any. A template is a string with one
`{text}`, and `{instruction}` and `{demonstrations}` if wanted, or a list of segments:

```yaml
templates:
  - join: separate                       # beside `template`; joint if left out, or if a bare list
    template:
      - {literal: "<s>Instruct:"}        # special tokens in it are parsed, in texts never
      - {instruction: {after: ","}}      # `after` belongs to the same segment
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
document, symmetric) may have other keys; `fit` is the job's section of that name. `adapters` belong
to the method's `model`: a job that names another model names its adapters too.

```yaml
for_models:
  SmolLM2-135M:                          # a name for people; the values below tell the model
    config: {model_type: llama, num_hidden_layers: 30, hidden_size: 576}
    because: chosen on STS-B train       # by whom, on what
    encoder: {layer: -1}                 # over the method's own, for this model alone
    roles: {query: {instruction: Find}}  # if wanted
```

## Generated texts

```yaml
encoder: {method: geneol, model: mistralai/Mistral-7B-v0.1}
generate:
  model: mistralai/Mistral-7B-Instruct-v0.1   # the encoder's own if left out
  count: 2                                    # answers for each kind
  summaries: false                            # whether each answer is summed up, and that embedded
  pool: {gpus_per_actor: 0.5}                 # actors of its own, beside those of `pool`
```

The vector of a text is then the mean of its own and those of what a language model made of it,
under the same templates. A method brings the section, `generate.method: geneol` takes it for
another encoder, `generate: null` leaves it out, and `kinds: {shorter: {instruction: ...,
demonstrations: [{text: ..., answer: ...}]}}` writes one's own. What is asked is a conversation in
the model's chat format: the instruction, "Alright.", `shots` of the demonstrations, the text. The
demonstrations and every token are drawn by a number of the text, `seed`, the kind and the number of
the answer alone, without a limit by rank (top_k). So a retry, another order, batch or number of
actors draws the same, as far as rounding allows: the last bits of logits differ with the padding,
and where a number falls so close to the border between two tokens, another one follows. What was
put is never made again: `OUT/generations/` has a file for each chunk (text_hash, kind, index, text,
tokens), put before the chunk is embedded, and read by a run that goes on, by later runs and by
other methods with the same generator. Equal texts in two chunks are made twice, by the same draws.
A text of null is an answer that failed or was empty: the text itself stands for it, and the summary
counts it. `Encoder.from_output(OUT)` generates for queries too; `preview` shows what is asked. With
`engine: vllm` (Ray's processor, where vLLM is installed) a pass over all chunks comes first.

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
They decide the vectors as the model does. The key may also be written `anchors`. The paper's exact
distance, by continuations of each pair, is `embedjob.trajectory_distance` and `embedjob score`.

Continuations are yours to write, or the model's own, as `method: trajectories` has it:

```yaml
heads: [{continuations: fit:c}]
fit: [{kind: continuations, name: c, sample: 40, count: 1, max_new_tokens: 20, seed: 17}]
```

Before its first vector a job then draws `sample` distinct texts of the corpus by `seed`, and
samples `count` continuations after each under the template, from the whole distribution (no top_k)
and up to the token that ends a text. Their token ids lie in `OUT/artefacts/` and in the recipe, in
place of the fit's name: they are part of the fingerprint, stay while the corpus grows, and serve
queries as well (`Encoder.from_output`). Ids follow the ids of a whole view, so that what is scored
is what was sampled, whatever a tokenizer makes of the seam.

## Beside the vector

```yaml
heads:
  - sparse_lm: {words: all, pooling: max, activation: relu, top_k: null, scale: null}
  - router: {scores: logits, join: column}
decode: {max_tokens: 10, until: '"'}     # the span is then the states from which words were said
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

`decode: {temperature: 0.7, seed: 42}` draws words in place of the likeliest ones, from the whole
distribution; without a temperature, as the authors' code, nothing is drawn. The draws of a text
depend on its tokens under the template, the seed and the word's number alone: a retry, another
order, other batches and other actors say the same, up to the last bits of logits, and queries are
drawn as the corpus was.
"""


def page(quality: str | Path) -> str:
    """Return docs/methods.md: a table of all methods, their figures, a paragraph on each.

    `quality` is the file that `make bench-quality` writes.
    """
    methods = {name: read_method(name) for name in names()}
    rows = "".join(_row(name, method) for name, method in methods.items())
    paragraphs = "".join(_paragraph(name, method) for name, method in methods.items())
    return _HEADER + rows + figures_chapter(read_yaml(quality)) + paragraphs + _WRITING


def _row(name: str, method: MethodFile) -> str:
    recipe = recipe_from({"model": method.model or "-", **method.encoder}, {})
    model = f"`{method.model}`" if method.model else "yours"
    made = validate(Generate, method.generate, at=name).texts if method.generate else 0
    attention = recipe.attention if "attention" in method.encoder else "the model's own"
    passes = "0" if method.static else _passes(recipe, 1 + made)
    needs = ", ".join(f"a {fit.kind} fit" for fit in method.fit) or "-"
    if recipe.decode is not None:
        needs = "sampled decoding" if recipe.decode.temperature else "greedy decoding"
    needs = f"{made} generated texts" if made else needs
    cells = (f"[{name}](#{name})", passes, method.forward_tokens, needs, attention, model)
    return f"| {' | '.join(cells)} |\n"


def _passes(recipe: Recipe, texts: int) -> str:
    """Return how often a text goes through the model, in whole and in part, as so many texts."""
    whole = str(recipe.views * texts)
    if blocks := sum(one.kind.extra_blocks(one.settings) for one in given(recipe.interventions)):
        return f"{whole} + {blocks} blocks"
    if recipe.decode is not None:
        # The pass over the prompt predicts the first token.
        return f"{whole} + up to {recipe.decode.max_tokens - 1} of one token"
    return whole


def _paragraph(name: str, method: MethodFile) -> str:
    roles = ", ".join(method.roles or ())
    apart = f" Its own keys for: {roles}." if roles else ""
    differs = f" What differs: {method.differs.strip()}" if method.differs else ""
    models = "".join(
        f" For {model} alone: {', '.join(f'`{key}`' for key in setting.encoder)}"
        f" ({setting.because.strip()})."
        for model, setting in (method.for_models or {}).items()
    )
    return (
        f"\n### {name}\n\n{method.summary.strip()}{apart}{differs}{models} Good for"
        f" {method.good_for.strip()}. Weights: {method.licence.strip()}. {reference(method)}\n"
    )


def reference(method: MethodFile) -> str:
    """Return the citation of a method."""
    cited = method.citation
    arxiv = f", arXiv:{cited.arxiv}" if cited.arxiv else ""
    return f"{cited.authors.strip()}. {cited.title.strip()}. {cited.year}{arxiv}."
