"""Hugging Face hub: local snapshots of models, and the hub's record of a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from embedjob.errors import ModelError
from embedjob.models.checkpoint import MODEL

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_EXPORTS = ["onnx/*", "openvino/*", "original/*", "coreml/*"]
_Answer = TypeVar("_Answer")


def snapshot(
    model: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    ask: bool = True,
    key: str = MODEL.key,
) -> Path:
    """Return the local snapshot of the model's files that match, fetched unless complete.

    With `ask` false nothing is fetched. ModelError if the snapshot cannot be had.
    """
    # Here, as below: it takes a fifth of a second, and most models lie on a disk.
    from huggingface_hub import snapshot_download

    folder = _ask(
        (model, key),
        lambda: snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_EXPORTS,
            local_files_only=not ask,
        ),
    )
    return Path(folder)


def model_record(model: str, revision: str | None, *, key: str = MODEL.key) -> "ModelInfo":
    """Return the hub's record of a model: commit, files with size and sha256, parameter counts."""
    from huggingface_hub import HfApi

    return _ask(
        (model, key),
        lambda: HfApi().model_info(model, revision=revision, files_metadata=True),
    )


def _ask(about: tuple[str, str], question: Callable[[], _Answer]) -> _Answer:
    model, key = about
    try:
        return question()
    except Exception as error:
        # The client lets through whatever its HTTP library raises, which differs by version; its
        # own errors have a request id in the middle of the text.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{key}: got {model!r}, which is no local directory or .gguf file and could"
            f" not be had from the Hugging Face hub: {reason} Allowed are a hub id, a local"
            " directory, a .gguf file, s3://BUCKET/DIRECTORY and package:NAME/PATH"
        ) from error
