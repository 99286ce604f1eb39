"""What the model would be given for the first few rows: views, spans and micro-batches."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from embedjob.encoder.folder import folder_layer
from embedjob.encoder.source import materialize
from embedjob.encoder.tokenizer import load_tokenizer
from embedjob.errors import InputError
from embedjob.jobfile import Draft, validate_partial
from embedjob.methods.resolution import default_model, resolve
from embedjob.shards.planning import Request, plan
from embedjob.shards.reading import read_chunk
from embedjob.survey import listed_input, source_in
from embedjob.text.microbatches import microbatches
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews

PREVIEW_BUDGET = 2048


def preview(draft: Draft, rows: int) -> list[dict[str, Any]]:
    """One object per row and view: ids, tokens, span, and what else decides its vector.

    Neither the weights nor the output are touched.
    """
    validate_partial(draft)
    draft = default_model(draft)
    shards, footers = listed_input(draft)
    folder = materialize(source_in(draft), tokenizer_only=True)
    resolved = resolve(draft, folder_layer(folder))
    request = Request(resolved.job.input, "0" * 64, resolved.job.output.chunk_rows, rows)
    chunks = plan(shards, footers, listed=(), request=request).chunks
    if not chunks:
        raise InputError("input.path: every shard is empty; there is nothing to preview")
    found = [row for chunk in chunks for row in read_chunk(chunk, resolved.job.input).to_pylist()]
    tokenizer = load_tokenizer(resolved.job.encoder)
    good = [row for row in found if row["text"] is not None]
    return list(_described(good, tokenizer))


def _described(
    rows: Sequence[dict[str, Any]], tokenizer: ViewTokenizer
) -> Iterator[dict[str, Any]]:
    views = tokenizer.views([row["text"] for row in rows])
    place = _places(views)
    for index in range(len(views.prefix)):
        ids = views.full_ids(index).tolist()
        text, view = divmod(index, views.views_per_text)
        yield {
            "row": rows[text]["row"],
            "view": view,
            "ids": ids,
            "tokens": tokenizer.tokens(ids),
            "span": views.span[index].tolist(),
            "shared_prefix": int(views.prefix_lengths[index]),
            "truncated": bool(views.truncated[index]),
            "microbatch": place[index],
            **_words(views, text, tokenizer),
        }


def _words(views: TokenViews, text: int, tokenizer: ViewTokenizer) -> dict[str, Any]:
    """The tokens of the text's own words, where sparse weights are kept of these alone."""
    return {} if views.words is None else {"words": tokenizer.tokens(views.words.of(text).tolist())}


def _places(views: TokenViews) -> dict[int, int]:
    batches = microbatches(views.lengths, budget=PREVIEW_BUDGET)
    return {int(view): number for number, batch in enumerate(batches) for view in batch}


def show(described: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints each view with its span underlined and its shared prefix dimmed."""
    for view in described:
        start, stop = view["span"]
        console.print(
            f"row {view['row']} view {view['view']}: {len(view['ids'])} tokens,"
            f" span {start}:{stop}, {view['shared_prefix']} shared,"
            f" micro-batch {view['microbatch']}" + (", cut" if view["truncated"] else ""),
            highlight=False,
        )
        line = Text()
        for position, token in enumerate(view["tokens"]):
            dimmed = "dim" if position < view["shared_prefix"] else ""
            style = "bold underline" if start <= position < stop else dimmed
            line.append(token, style=style).append(" ")
        console.print(line)
