"""Whether the config.json of a model, or an adapter_config.json, is there and can be used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from embedjob.encoder import nvembed
from embedjob.encoder.files import ADAPTER, Holding
from embedjob.errors import ModelError


class Source(Protocol):
    """What is asked of where a model comes from."""

    @property
    def model(self) -> str:
        """Its name in the job."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether its own Python code may be run."""
        ...

    @property
    def holding(self) -> Holding:
        """What its directory holds."""
        ...


def require_config(directory: Path, config: Mapping[str, Any] | None, source: Source) -> None:
    """ModelError if a directory has no config, or one that asks for code that may not be run."""
    holding = source.holding
    if config is None:
        found = ", ".join(sorted(path.name for path in directory.glob("*"))[:12]) or "nothing"
        raise ModelError(
            f"{holding.key}: {source.model} has no {holding.config}; found: {found}. "
            + _remedy(directory, holding)
        )
    ours = holding is ADAPTER or nvembed.is_nvembed(config)
    if ours or not config.get("auto_map") or source.trust_remote_code:
        return
    # transformers takes seconds to import, and few models bring code of their own.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{holding.key}: {source.model} is of a kind ({config.get('model_type')}) that only its"
            " own Python code can run; set encoder.trust_remote_code: true if you trust it"
        )


def _remedy(directory: Path, holding: Holding) -> str:
    if holding is ADAPTER:
        return "Give a directory that a PEFT adapter was saved to"
    if (directory / ADAPTER.config).exists():
        return (
            "It is an adapter without the config of its model: give that one as encoder.model, and"
            " this in encoder.adapters"
        )
    return "Give a directory that a transformers or sentence-transformers model was saved to"
