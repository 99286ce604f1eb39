"""URLs to storage backends; a plain path, a `~` path and `file://` are all local."""

import os
import re

from embedjob.config.url_secrets import ADVICE, holds_credentials, secret_in
from embedjob.errors import AccessError
from embedjob.storage.access import access_errors
from embedjob.storage.backend import Backend
from embedjob.storage.local import LocalBackend

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def split(url: str) -> tuple[str, str]:
    """Split a URL into its protocol ("" for a local path, which is made absolute) and its path.

    AccessError where the URL holds a secret.
    """
    match = _URL.fullmatch(url)
    protocol, path = ("", url) if match is None else match.groups()
    # A listed key of a bucket may look like a query, which S3 does not have.
    plain = protocol in ("s3", "s3a") and not holds_credentials(protocol, path)
    if not plain and (found := secret_in(url)):
        raise AccessError(f"got a place with {found}, {ADVICE}")
    if protocol in ("", "file"):
        return "", os.path.abspath(os.path.expanduser(path))
    return ("s3" if protocol == "s3a" else protocol), path.rstrip("/")


def locate(url: str) -> tuple[Backend, str, str]:
    """Return the backend of a URL, the path there, and the prefix that makes a path a URL again."""
    protocol, path = split(url)
    if not protocol:
        return LocalBackend(), path, ""
    if protocol == "s3":
        # Here, as below: a client library takes half a second to import.
        from embedjob.storage.s3 import S3Backend

        with access_errors(url):
            return S3Backend(), path, "s3://"
    from embedjob.storage.fsspec_backend import FsspecBackend

    backend = FsspecBackend(protocol)
    return backend, *backend.spelling(f"{protocol}://{path}")
