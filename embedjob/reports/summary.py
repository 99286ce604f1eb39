"""The end of a run, on one screen."""

from rich.console import Console
from rich.table import Table

from embedjob.job.result import Result, Summary

_ROWS = ("rows", "embedded", "reused", "deduplicated", "nulls", "quarantined")


def show_summary(result: Result, console: Console) -> None:
    """Prints what was done, what was found done, and where the files are."""
    said = result.summary
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("chunks", _chunks(result))
    if said.chunks_written:
        counted = [f"{getattr(said, key):,} {key}" for key in _ROWS if getattr(said, key)]
        twice = f" ({said.deduplicated / said.rows:.1%} duplicates)" if said.deduplicated else ""
        table.add_row("rows", (", ".join(counted) or "0 rows") + twice)
        table.add_row(
            "tokens",
            f"{said.tokens:,} at {said.tokens_per_second:,.0f}/s, {said.truncated:,} texts cut,"
            f" {said.padding_share:.1%} padding, {said.prefix_tokens_saved:,} shared and not run",
        )
        table.add_row("encoders", _times(said))
    table.add_row("seconds", f"{said.seconds:,.1f}")
    table.add_row("output", result.out)
    table.add_row("snapshot", said.snapshot or "not published")
    table.add_row("fingerprint", said.fingerprint[:12])
    console.print(table, highlight=False)
    if not result.faults and not said.chunks_written:
        console.print(f"nothing to do: {result.verdict}", highlight=False)


def _times(said: Summary) -> str:
    shares = ", ".join(f"{share:.0%} {name}" for name, share in said.time_share.items())
    if said.flops_utilization is None:
        return shares
    return f"{shares}; computing, {said.flops_utilization:.0%} of the device's peak"


def _chunks(result: Result) -> str:
    said = result.summary
    failed = f", {said.chunks_failed:,} failed" if said.chunks_failed else ""
    return (
        f"{said.chunks_planned:,} planned, {said.chunks_done_before:,} done before,"
        f" {said.chunks_written:,} written{failed}"
    )
