"""Secrets in URLs: passwords, tokens and signed queries, which no job may hold.

What a job says of its places is written into the output, its files and its messages, and anybody
who may read these would read the secret.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from embedjob.errors import ConfigError

ADVICE = (
    "which would be written into outputs, logs and messages; leave it out, and give passwords and"
    " tokens to each node by its environment, profile or role"
)
# Up to a blank, without the punctuation of a sentence; quotes may be part of a password.
_URL = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]*)://(\S*?)(?=['\",;:.)\]]*(?:\s|$))")
# Before the host stands a bare user name there, which is no secret, and may look like anything.
_USER_BEFORE_HOST = frozenset({"ftp", "hdfs", "sftp", "smb", "ssh", "webhdfs"})
# And there a container, whose names Azure limits: a token has other characters, or more of them.
_CONTAINER_BEFORE_HOST = frozenset({"abfs", "abfss", "wasb", "wasbs"})
_CONTAINER = re.compile(r"\$(root|web|logs)|(?=.{3,63}$)[a-z0-9]+(-[a-z0-9]+)*")
_VARIABLE = re.compile(r"\$\{\w+\}")
_PARAMETER = re.compile(r"[?&;#]([^?&;#=/]+)=[^&;#]")
# Of a parameter's name without hyphens and underscores.
_SECRET_NAME = re.compile(
    r"signature|credential|secret|passw|pwd|token$|sas$|sig$|auth$|^key$|connectionstring"
    r"|(access|account|api|private)key"
)


def secret_in(text: str) -> str | None:
    """Return what kind of secret a URL in the text holds, in words without it; None without one."""
    for scheme, rest in _URL.findall(text):
        if holds_credentials(scheme, rest):
            return f"credentials before the host of {scheme}://"
        for name in _PARAMETER.findall(re.sub(r"^[^?#]*", "", rest)):
            if names_secret(unquote(name)):
                return f"a secret in the query of {scheme}:// ({_plain(unquote(name))[:40]})"
    return None


def names_secret(name: str) -> bool:
    """Tell whether a parameter, or a variable of the environment, is named like a secret."""
    return _SECRET_NAME.search(_plain(name)) is not None


def holds_credentials(scheme: str, rest: str) -> bool:
    """Tell whether a URL, split behind its `://`, has a password or a token before its host."""
    host, _, path = rest.partition("/")
    user, at, _ = unquote(host.partition("?")[0]).rpartition("@")
    if at and scheme.lower() in _CONTAINER_BEFORE_HOST:
        return not _CONTAINER.fullmatch(_VARIABLE.sub("abc", user))
    if at:
        return ":" in user or scheme.lower() not in _USER_BEFORE_HOST
    # A password may hold a slash, and then the "@" comes after it. An access point is an ARN.
    return "@" in path and re.match(r"(?!arn:|\[)[^:]*:(?!\d+$)", host) is not None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def redacted(text: str) -> str:
    """Return the text with every URL that holds a secret cut down to its scheme."""
    return _URL.sub(lambda url: f"{url[1]}://***" if secret_in(url[0]) else url[0], text)


def refuse_secrets(document: Any, at: str = "") -> None:
    """Raise ConfigError for the first URL with a secret in a document, by its key, without it."""
    for path, text in _texts(document, at):
        if "://" in text and (found := secret_in(text)):
            raise ConfigError(f"{redacted(path) or 'job'}: got {found}, {ADVICE}")


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every string in a document, keys too, with its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield path, str(key)
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{number}" if path else str(number))
