"""Access errors: storage's answers about keys, rights, endpoints and buckets, as one sentence."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from embedjob.errors import AccessError, EmbedjobError

_ENDPOINT = "check AWS_ENDPOINT_URL and the network of this node"
_KEYS = "check the credentials in the environment, the profile or the role of this node"
_RIGHTS = "these credentials may not do this: grant list, read and (for an output) write"
# What a server answers that cannot serve a request now. A HEAD answers without a body, so its codes
# are bare numbers.
BUSY = frozenset(
    {
        *("SlowDown", "ServiceUnavailable", "InternalError", "OperationAborted"),
        *("RequestTimeout", "RequestLimitExceeded", "Throttling", "ThrottlingException"),
        *("TooManyRequests", "BandwidthLimitExceeded", "IncompleteBody", "BadDigest"),
        *("XAmzContentSHA256Mismatch", "408", "429", "500", "502", "503", "504"),
    }
)
# By the class of a client's error or the code that the server answered: an expired token is a 400
# to a HEAD.
PROBLEMS = {
    **dict.fromkeys(BUSY, "storage is too busy or broken to answer; run again later"),
    "NoSuchBucket": "the bucket does not exist; create it, or correct the name",
    "ParamValidationError": "got a name that is not allowed for a bucket or key; correct it",
    "InvalidBucketName": "got a name that is not allowed for a bucket; correct it",
    "EndpointConnectionError": f"the endpoint cannot be reached; {_ENDPOINT}",
    "ConnectTimeoutError": f"the endpoint does not answer; {_ENDPOINT}",
    "ReadTimeoutError": f"the endpoint does not answer; {_ENDPOINT}",
    **dict.fromkeys(
        ("NotS3", "ResponseParserError", "MethodNotAllowed"),
        f"the server there does not speak S3; {_ENDPOINT}",
    ),
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "AccessDenied": _RIGHTS,
    "403": _RIGHTS,
    "301": "the bucket is in another region; set AWS_REGION",
    "400": f"the request was refused, as with an expired token; {_KEYS}",
    **dict.fromkeys(("401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"), _KEYS),
    **dict.fromkeys(("InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"), _KEYS),
}
_HUB = (
    "the hub did not answer as it should; check the network of this node, HF_ENDPOINT, and that the"
    " token of this node (HF_TOKEN) may read it"
)
_LOCAL_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


@contextmanager
def access_errors(url: str) -> Iterator[None]:
    """Raise AccessError in place of an error about keys, rights, endpoints or buckets at `url`."""
    try:
        yield
    except _client_errors(url) as error:
        if url.startswith("hf://"):
            if isinstance(error, FileNotFoundError | EmbedjobError):
                raise
            raise AccessError(f"{url}: {_HUB} ({type(error).__name__})") from error
        code = error_code(error)
        if not isinstance(error, OSError) or code in PROBLEMS:
            # The library's own text stays out: it might hold a secret.
            raise AccessError(f"{url}: {PROBLEMS.get(code, _KEYS)} ({code})") from error
        if isinstance(error, PermissionError) or error.errno in _LOCAL_REFUSALS:
            reason = f"{error.strerror or _RIGHTS}; choose another place or grant the right"
            raise AccessError(f"{url}: {reason}") from error
        raise


def _client_errors(url: str) -> tuple[type[Exception], ...]:
    """Return the errors that storage raises; those of S3's client where it was imported.

    The hub's client lets through what its HTTP library raises, which differs by version.
    """
    if url.startswith("hf://"):
        return (Exception,)
    if "botocore" not in sys.modules:
        return (OSError,)
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return (OSError, BotoCoreError, ResponseParserError)


def error_code(error: BaseException) -> str:
    """Return the code that S3 answered, or the class name of an error that the client raised."""
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):  # none, or that of an HTTP library, which is no answer of S3
        return type(error).__name__
    return str(response.get("Error", {}).get("Code", type(error).__name__))
