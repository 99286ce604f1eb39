"""Parquet shards in, embedding shards out, exactly once.

`Encoder` embeds queries by the recipe of an output; `open_snapshot` reads what a run published.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedjob.encoder.encoder import Encoder
    from embedjob.output.snapshot import open_snapshot

__all__ = ["Encoder", "open_snapshot"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import embedjob` must not cost the seconds that torch takes.
    if name == "Encoder":
        from embedjob.encoder.encoder import Encoder

        return Encoder
    if name == "open_snapshot":
        from embedjob.output.snapshot import open_snapshot

        return open_snapshot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
