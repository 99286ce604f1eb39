"""What the model would be given for the first few rows: views, spans and micro-batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from embedjob.config.job_file import JobSource
from embedjob.config.recipe import Recipe
from embedjob.config.tables import FIT_NAME
from embedjob.errors import ConfigError, InputError, amount
from embedjob.input.listing import described_unread
from embedjob.input.reading import HEADING, read_chunk
from embedjob.job.input_listing import list_input
from embedjob.job.output import tokenizer_notes
from embedjob.job.planning import cut_input, first_chunks
from embedjob.job.resolve import resolve
from embedjob.models.questions import load_questioner
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.microbatches import microbatches
from embedjob.text.views import Passages, TokenizesTexts, TokenViews

PREVIEW_BUDGET = 2048
_FAULTS = 20
_READ = ("row", "text", HEADING)


def preview(
    source: JobSource, rows: int, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Return an object per row and view: ids, tokens, span, and what else decides its vector.

    Where the job generates, there is an object per row and question, too: kind, index and prompt.
    Neither the weights nor the output are touched. `say` takes a line for people where the model's
    tokenizer files disagree.
    """
    job = resolve(source)
    config = job.config
    if config.encoder.model.startswith(FIT_NAME):
        raise ConfigError(
            f"encoder.model: {config.encoder.model} is made by a run, or by `embedjob fit`, out of"
            " all texts: before that no text has a term"
        )
    listing = list_input(config.input)
    # The names of its chunks are not used, so that no fingerprint is needed.
    cut = cut_input(
        config.input, listing, chunk_rows=config.output.chunk_rows, fingerprint="0" * 64
    )
    if (named := config.encoder.continuations_fit) is not None:
        say(f"fit: {named} is yet to sample continuations: the views are shown without them")
    if listing.unread:
        say(f"not read: {described_unread(listing.unread)}")
    for url, reason in cut.faults[:_FAULTS]:
        say(f"fault: {url}: {reason}")
    if not cut.chunks and cut.faults:
        rest = len(cut.faults) - _FAULTS
        named = "named above" if rest <= 0 else f"the first {_FAULTS} are named above"
        raise InputError(
            f"input.path: no shard can be shown: {amount(len(cut.faults), 'fault')} ({named}), and"
            " no rows in the other shards; repair or remove the shards with faults"
        )
    if not cut.chunks:
        raise InputError("input.path: every shard is empty; there is nothing to preview")
    chunks = first_chunks(cut.chunks, rows)
    tables = (read_chunk(chunk, config.input) for chunk in chunks)
    read = [
        row
        for table in tables
        for row in table.select([one for one in _READ if one in table.column_names]).to_pylist()
    ]
    tokenizer = load_tokenizer(config.encoder)
    for note in tokenizer_notes(job):
        say(note)
    good = [row for row in read if row["text"] is not None]
    return [*_described(good, tokenizer), *_asked(good, config.encoder)]


def _asked(rows: Sequence[dict[str, Any]], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield what the generator is asked about each row, if the recipe has one."""
    if recipe.generate is None:
        return
    questioner = load_questioner(recipe)
    for question in questioner.transformations([row["text"] for row in rows]):
        yield {
            "row": rows[question.about]["row"],
            "kind": question.kind,
            "index": question.number,
            "ids": question.ids,
            "prompt": questioner.shown(question),
        }


def _described(
    rows: Sequence[dict[str, Any]], tokenizer: TokenizesTexts
) -> Iterator[dict[str, Any]]:
    texts, owners = [row["text"] for row in rows], range(len(rows))
    passages = None
    if tokenizer.splitter is not None:
        passages = tokenizer.splitter(texts, [row.get(HEADING) for row in rows])
        texts, owners = passages.texts, passages.owners.tolist()
    views = tokenizer.views(texts)
    place = _places(views)
    for index in range(len(views.prefix)):
        ids = views.full_ids(index).tolist()
        unit, view = divmod(index, views.views_per_text)
        text = int(np.searchsorted(views.text_units, unit, side="right")) - 1
        yield {
            "row": rows[owners[text]]["row"],
            "view": view,
            **({} if passages is None else _passage(passages, text)),
            **_part(views, text, unit),
            "ids": ids,
            "tokens": tokenizer.tokens(ids),
            "span": views.span[index].tolist(),
            "shared_prefix": int(views.prefix_lengths[index]),
            "truncated": bool(views.truncated[index]),
            "microbatch": place[index],
            **_words(views, text, tokenizer),
        }


def _words(views: TokenViews, text: int, tokenizer: TokenizesTexts) -> dict[str, Any]:
    """Return the tokens of the text's own words, where sparse weights are kept of these alone."""
    return {} if views.words is None else {"words": tokenizer.tokens(views.words.of(text).tolist())}


def _part(views: TokenViews, text: int, unit: int) -> dict[str, Any]:
    """Return which part of its text a view is, or the tokens and characters of its parts."""
    if views.parts is not None:
        mine = slice(*views.parts.offsets[text : text + 2])
        spans, chars = views.parts.span[mine].tolist(), views.parts.chars[mine].tolist()
        return {"parts": [{"span": a, "chars": b} for a, b in zip(spans, chars, strict=True)]}
    return {} if views.cuts is None else {"part": unit - int(views.cuts.offsets[text])}


def _passage(passages: Passages, number: int) -> dict[str, Any]:
    """Return which passage of its row a text is, and its characters in the text as read."""
    first = int(passages.offsets[passages.owners[number]])
    return {"part": number - first, "chars": passages.chars[number].tolist()}


def _places(views: TokenViews) -> dict[int, int]:
    batches = microbatches(views.lengths, budget=PREVIEW_BUDGET)
    return {int(view): number for number, batch in enumerate(batches) for view in batch}


def show(described: Sequence[dict[str, Any]], console: Console) -> None:
    """Print each view, its span underlined and its shared prefix dimmed, then what is asked."""
    for view in described:
        if "prompt" in view:
            console.print(
                f"row {view['row']} {view['kind']} {view['index']}: {len(view['ids'])} tokens",
                highlight=False,
            )
            console.print(Text(view["prompt"]))
            continue
        start, stop = view["span"]
        console.print(
            f"row {view['row']} view {view['view']}: {len(view['ids'])} tokens,"
            f" span {start}:{stop}, {view['shared_prefix']} shared,"
            f" micro-batch {view['microbatch']}"
            + (", cut" if view["truncated"] else "")
            + _parts_note(view),
            highlight=False,
        )
        line = Text()
        for position, token in enumerate(view["tokens"]):
            dimmed = "dim" if position < view["shared_prefix"] else ""
            style = "bold underline" if start <= position < stop else dimmed
            line.append(token, style=style).append(" ")
        console.print(line)


def _parts_note(view: Mapping[str, Any]) -> str:
    if "part" in view:
        return f", part {view['part']}"
    edges = [str(part["span"][1]) for part in view.get("parts", ())[:-1]]
    return f", parts end at {', '.join(edges)}" if edges else ""
