"""Which place a URL means; a plain path, a `~` path and `file://` are all local."""

import os
import re

from embedjob.errors import AccessError
from embedjob.storage.entry import Backend
from embedjob.storage.local import Local
from embedjob.storage.other import Other
from embedjob.storage.refusals import refusals
from embedjob.storage.s3 import S3

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_CREDENTIALS = re.compile(r"[^/@]*:[^/]*@")


def split(url: str) -> tuple[str, str]:
    """The protocol ("" for a local path, which is made absolute) and the path."""
    match = _URL.fullmatch(url)
    if match is None or match[1] == "file":
        return "", os.path.abspath(os.path.expanduser(match[2] if match else url))
    protocol, path = match.groups()
    if _CREDENTIALS.match(path):
        raise AccessError(
            f"got credentials in a {protocol}:// URL; give them by the environment, "
            "the profile or the role of each node"
        )
    return ("s3" if protocol == "s3a" else protocol), path.rstrip("/")


def locate(url: str) -> tuple[Backend, str, str]:
    """Where the URL lives, its path there, and what goes before a path to make a URL."""
    protocol, path = split(url)
    if not protocol:
        return Local(), path, ""
    if protocol == "s3":
        with refusals(url):
            return S3(), path, "s3://"
    other = Other(protocol)
    return other, *other.spelling(f"{protocol}://{path}")
