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
    table.add_row("chunks", _chunks(result))
    if summary.chunks_written:
        counted = [f"{getattr(summary, key):,} {key}" for key in _ROWS if getattr(summary, key)]
        table.add_row("rows", (", ".join(counted) or "0 rows") + _duplicates(summary))
        table.add_row(
            "tokens",
            f"{summary.tokens:,} at {summary.tokens_per_second:,.0f}/s,"
            f" {summary.truncated:,} texts cut, {summary.padding_share:.1%} padding,"
            f" {summary.prefix_tokens_saved:,} shared and not run",
        )
        table.add_row("encoders", _times(summary))
    if changes := _changes(summary):
        table.add_row("corpus", changes)
    table.add_row("seconds", f"{summary.seconds:,.1f}")
    table.add_row("output", result.out)
    table.add_row("snapshot", summary.snapshot or "not published")
    table.add_row("fingerprint", summary.fingerprint[:12])
    for note in result.notes:
        table.add_row("note", Text(note))
    console.print(table, highlight=False)
    if not result.faults and not summary.chunks_written:
        console.print(f"nothing to do: {result.verdict}", highlight=False)


def _duplicates(summary: Summary) -> str:
    share = summary.deduplicated / summary.rows if summary.rows else 0.0
    return f" ({share:.1%} duplicates)" if summary.deduplicated else ""


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


def _chunks(result: Result) -> str:
    summary = result.summary
    failed = f", {summary.chunks_failed:,} failed" if summary.chunks_failed else ""
    return (
        f"{summary.chunks_planned:,} planned, {summary.chunks_done_before:,} done before,"
        f" {summary.chunks_written:,} written{failed}"
    )
