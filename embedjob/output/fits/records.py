"""Records: which artefact each fit of an output has made.

A fit is known by a key, the hash of all that it is computed from but the rows: so it is made once,
and stays while the corpus grows. A record is put once; of several the last counts.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

from embedjob.errors import OutputError
from embedjob.output.documents import NONE, Kind, read_document, require_kinds
from embedjob.output.fits.artefacts import ARTEFACTS_FOLDER
from embedjob.storage.objects import absolute, create_json, join, list_files

# The folder of an output in which vectors are embedded for its fits, an output in itself.
VECTORS_FOLDER = "fits"
_NAME = re.compile(r"([0-9a-f]{16})-([0-9]{8,})\.json")
_KINDS: Kind = {
    "artefact": re.compile("[0-9a-f]{64}"),
    "kind": str,
    "name": str,
    "vectors": (NONE, re.compile("[0-9a-f]{16}")),
    "token": str,
}


@dataclass(frozen=True)
class Record:
    """The artefact that a fit has made, the `number`th of it; `name` is the fit's in its job.

    `vectors` is the folder below `fits/` of the vectors that were embedded for it; None where they
    were there already.
    """

    key: str
    number: int
    kind: str
    artefact: str
    name: str
    vectors: str | None


def vectors_place(out: str, vectors: str) -> str:
    """Return the place of the vectors that are embedded for a fit, by the name of their folder."""
    return join(out, VECTORS_FOLDER, vectors)


def put_record(out: str, record: Record) -> Record:
    """Put the record of a fit; return the record that stands under its number."""
    key, number = record.key, record.number
    url = join(out, ARTEFACTS_FOLDER, "made", f"{key}-{number:08d}.json")
    document = {
        name: value for name, value in asdict(record).items() if name not in ("key", "number")
    }
    return _record(create_json(url, document), url, key, number)


def read_records(out: str) -> dict[str, Record]:
    """Read the last record of each fit, by its key."""
    last: dict[str, tuple[int, str]] = {}
    for file in list_files(join(absolute(out), ARTEFACTS_FOLDER, "made")):
        if match := _NAME.fullmatch(file.name):
            key, number = match.groups()
            last[key] = max(last.get(key, (0, "")), (int(number), file.url))
    return {
        key: _record(read_document(url), url, key, number) for key, (number, url) in last.items()
    }


def _record(document: Any, url: str, key: str, number: int) -> Record:
    require_kinds(document, _KINDS, url=url, what="a record of a fit")
    try:
        fields = {name: document[name] for name in ("kind", "artefact", "name", "vectors")}
        return Record(key, number, **fields)
    except (KeyError, TypeError) as error:
        raise OutputError(f"{url}: is not a record of a fit ({error}); move it away") from error
