"""Models of the Hugging Face hub: their snapshot on this node, and what the hub says of them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo, snapshot_download

from embedjob.errors import ModelError

TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_EXPORTS = ("onnx/*", "openvino/*", "original/*", "coreml/*")
_Answer = TypeVar("_Answer")


def snapshot(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local snapshot of the model's files that match; fetched if it is not there."""
    found = _ask(
        model,
        lambda: snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_EXPORTS),
        ),
    )
    return Path(found)


def local_snapshot(model: str, revision: str | None) -> Path | None:
    """The snapshot that this node already has; None if it has none."""
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def described(model: str, revision: str | None) -> ModelInfo:
    """The hub's own record of the model: commit, files with size and sha256, parameter counts."""
    return _ask(model, lambda: HfApi().model_info(model, revision=revision, files_metadata=True))


def _ask(model: str, question: Callable[[], _Answer]) -> _Answer:
    try:
        return question()
    except (OSError, ValueError) as error:
        # Errors of the hub's client are OSErrors, with a request id in the middle of the text.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"encoder.model: got {model!r}, which is no local directory or .gguf file and could"
            f" not be had from the Hugging Face hub: {reason} Allowed are a hub id, a local"
            " directory, a .gguf file, s3://BUCKET/DIRECTORY and package:NAME/PATH"
        ) from error
