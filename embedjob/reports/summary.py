"""The end of a run, on one screen."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedjob.job.result import Result, Summary

_ROWS = ("rows", "embedded", "reused", "deduplicated", "nulls", "quarantined")


def show_summary(result: Result, console: Console) -> None:
    """Print what was done, what was found done, and where the files are."""
    summary = result.summary
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a long path is folded, and no part of it is left out

    def add(name: str, value: str) -> None:
        table.add_row(name, Text(value))  # never markup: paths may hold [brackets] and :colons:

    add("chunks", _chunks(result))
    if summary.chunks_written:
        counted = [f"{getattr(summary, key):,} {key}" for key in _ROWS if getattr(summary, key)]
        add("rows", (", ".join(counted) or "0 rows") + _duplicates(summary) + _passages(summary))
        add(
            "tokens",
            f"{summary.tokens:,} at {summary.tokens_per_second:,.0f}/s,"
            f" {summary.truncated:,} texts cut, {summary.padding_share:.1%} padding,"
            f" {summary.prefix_tokens_saved:,} shared and not run",
        )
        add("encoders", _times(summary))
        if summary.generated or summary.generations_reused:
            add("generations", _generations(summary))
    if changes := _changes(summary):
        add("corpus", changes)
    if summary.files_not_read:
        add("not read", summary.not_read)
    add("seconds", f"{summary.seconds:,.1f}")
    add("output", result.out)
    add("snapshot", summary.snapshot or "not published")
    add("fingerprint", summary.fingerprint[:12])
    for note in result.notes:
        add("note", note)
    console.print(table, highlight=False)
    if not result.exit_code and not summary.chunks_written:
        console.print(Text(f"nothing to do: {result.verdict}"), highlight=False)


def _duplicates(summary: Summary) -> str:
    share = summary.deduplicated / summary.rows if summary.rows else 0.0
    return f" ({share:.1%} duplicates)" if summary.deduplicated else ""


def _passages(summary: Summary) -> str:
    reused = f", {summary.passages_reused:,} of them reused" if summary.passages_reused else ""
    return f" in {summary.passages:,} passages{reused}" if summary.passages else ""


def _changes(summary: Summary) -> str:
    """Say how the input differs from the corpus that was served; nothing for a first run."""
    if not summary.rows_before:
        return ""
    shards = (summary.shards_added, summary.shards_changed, summary.shards_removed)
    named = zip(shards, ("added", "changed", "removed"), strict=True)
    changed = ", ".join(f"{count:,} {what}" for count, what in named if count)
    return f"{summary.rows_before:,} rows before" + (f"; shards: {changed}" if changed else "")


def _times(summary: Summary) -> str:
    shares = ", ".join(f"{share:.0%} {name}" for name, share in summary.time_share.items())
    if summary.flops_utilization is None:
        return shares
    return f"{shares}; computing, {summary.flops_utilization:.0%} of the device's peak"


def _generations(summary: Summary) -> str:
    fallbacks = summary.generation_fallbacks
    return (
        f"{summary.generated:,} of {summary.generated_tokens:,} tokens,"
        f" {summary.generations_reused:,} there already"
        + (f"; the text itself for {fallbacks:,} that are empty" if fallbacks else "")
    )


def _chunks(result: Result) -> str:
    summary = result.summary
    failed = f", {summary.chunks_failed:,} failed" if summary.chunks_failed else ""
    failed += f", {summary.chunks_left:,} left" if summary.chunks_left else ""
    return (
        f"{summary.chunks_planned:,} planned, {summary.chunks_done_before:,} done before,"
        f" {summary.chunks_written:,} written{failed}"
    )
