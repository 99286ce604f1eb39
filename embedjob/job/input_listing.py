"""Input listing: the shards of an input as they are now, and the footers of changed shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedjob.config.job import Input
from embedjob.errors import InputError
from embedjob.input.chunks import Shard
from embedjob.input.columns import columns_of
from embedjob.input.footers import Footer, Wanted
from embedjob.input.listing import find_files, read_footers
from embedjob.input.tables.table_files import list_table
from embedjob.output.manifest import remembered
from embedjob.output.snapshot import Snapshot


@dataclass(frozen=True)
class InputListing:
    """The shards of an input, and of each by URL its footer, or why it has none.

    For a table, `version` is the version that the shards belong to, `place` its folder, and
    `deleted` the numbers of its deleted rows, by shard. `wanted` is what footers were read for.
    """

    shards: tuple[Shard, ...]
    footers: Mapping[str, Footer | str]
    unread: tuple[str, ...] = ()
    version: str | None = None
    place: str | None = None
    deleted: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    wanted: Wanted | None = None


def list_input(job_input: Input, served: Snapshot | None = None) -> InputListing:
    """Find the shards and read their footers; InputError where not one shard can be read.

    A shard that is unchanged since the `served` snapshot is not opened: its footer is there.
    """
    if job_input.table is None:
        found, wanted = find_files(job_input.path), columns_of(job_input).wanted
        footers = _footers(found.shards, wanted, served)
        listing = InputListing(found.shards, footers, found.unread, wanted=wanted)
    else:
        table = list_table(job_input.table, columns_of(job_input))
        footers = _footers(table.shards, table.wanted, served)
        listing = InputListing(
            table.shards,
            {url: table.footer(footer) for url, footer in footers.items()},
            version=table.version,
            place=table.place,
            deleted=table.deleted,
            wanted=table.wanted,
        )
    problems = [one for one in listing.footers.values() if isinstance(one, str)]
    if problems and len(problems) == len(listing.footers):
        first = listing.shards[0].url
        where = "path" if job_input.table is None else "table"
        raise InputError(f"input.{where}: {first} is {problems[0]}; no shard can be read")
    return listing


def _footers(
    shards: Sequence[Shard], wanted: Wanted, served: Snapshot | None
) -> dict[str, Footer | str]:
    known = remembered(served.shards, served.footers, wanted) if served else {}
    footers: dict[str, Footer | str] = {
        shard.url: known[shard.url, shard.etag]
        for shard in shards
        if (shard.url, shard.etag) in known
    }
    opened = [shard.stored for shard in shards if shard.url not in footers]
    return footers | (read_footers(opened, wanted) if opened else {})
