"""What a model folder decides by itself: the sentence-transformers layout, read as config keys."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from embedjob.encoder.facts import ModelFacts, config_of, facts_of
from embedjob.encoder.source import read_json, transformer_directory
from embedjob.encoder.tokenizer import lowercases, read_tokenizer
from embedjob.errors import ModelError

_DEFAULT_MAX_TOKENS = 512
_POOLINGS: Mapping[str, dict[str, Any]] = {
    "cls": {"span": "first_token", "pooling": "mean"},
    "mean": {"span": "all", "pooling": "mean"},
    "max": {"span": "all", "pooling": "max"},
    "weightedmean": {"span": "all", "pooling": "weighted_mean"},
    "lasttoken": {"span": "last_token", "pooling": "mean"},
}
_OLD_POOLINGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_FIRST_WORDS = ("a", "the", "The", "of", "for", "it", "7")
_ROLE_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


def folder_layer(directory: Path) -> dict[str, Any]:
    """The keys that the folder sets: {"encoder": keys, "roles": {role: keys}}, as YAML would."""
    known = facts_of(config_of(directory))
    encoder: dict[str, Any] = {} if known.causal else {"attention": "bidirectional"}
    if known.max_positions and known.max_positions < _DEFAULT_MAX_TOKENS:
        encoder["max_tokens"] = known.max_positions
    modules = read_json(directory / "modules.json")
    if not modules:
        return {"encoder": encoder, "roles": {}}
    encoder |= {"finish": [], "layer": -1}
    for module in modules:
        encoder |= _module(module, directory)
    encoder |= _max_tokens(directory, known)
    settings = read_json(directory / "config_sentence_transformers.json") or {}
    if settings.get("similarity_fn_name"):
        encoder["similarity"] = settings["similarity_fn_name"]
    prompts = {name: text for name, text in (settings.get("prompts") or {}).items() if text}
    if prompts and not _pools_prompts(modules, directory):
        pooled = _without_prompt(encoder, list(prompts.values()), directory)
    else:
        pooled = {}
    roles = _roles(prompts, pooled)
    if default := prompts.get(settings.get("default_prompt_name")):
        encoder |= {"templates": [_template(default)], **pooled}
    return {"encoder": encoder, "roles": roles}


def _module(module: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    name = str(module.get("type", "")).rpartition(".")[2]
    if name not in _MODULES:
        raise ModelError(
            f"{directory / 'modules.json'}: got the module {name}, which is not available in this"
            f" version; allowed are {', '.join(_MODULES)}"
        )
    return _MODULES[name](directory / str(module.get("path", "")))


def _transformer(folder: Path) -> dict[str, Any]:
    settings = _transformer_settings(folder)
    if settings.get("do_lower_case") and not lowercases(folder):
        raise ModelError(
            f"{folder}: do_lower_case, with a tokenizer that keeps capitals, is not available in"
            " this version"
        )
    return {}


def _pooling(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json") or {}
    modes = config.get("pooling_mode") or [m for k, m in _OLD_POOLINGS.items() if config.get(k)]
    modes = [modes] if isinstance(modes, str) else (list(modes) or ["mean"])
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{folder / 'config.json'}: got the pooling {' + '.join(modes)}, which is not available"
            f" in this version; allowed is one of {', '.join(_POOLINGS)}"
        )
    return dict(_POOLINGS[modes[0]])


def _normalize(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json") or {}
    if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ModelError(
            f"{folder / 'config.json'}: Normalize of {config['module_input_name']} is not available"
            " in this version"
        )
    return {"finish": [{"normalize": True}]}


_MODULES: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "Transformer": _transformer,
    "Pooling": _pooling,
    "Normalize": _normalize,
}


def _transformer_settings(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("sentence_*_config.json"))
    return read_json(found[0]) or {} if found else {}


def _max_tokens(directory: Path, known: ModelFacts) -> dict[str, Any]:
    inner = transformer_directory(directory)
    limit = _transformer_settings(inner).get("max_seq_length")
    if limit is None:
        limit = (read_json(inner / "tokenizer_config.json") or {}).get("model_max_length")
    limits = [int(one) for one in (limit, known.max_positions) if one is not None]
    # A tokenizer without a limit says so with a number of thirty digits.
    return {"max_tokens": min(limits)} if limits and min(limits) < 10**9 else {}


def _pools_prompts(modules: list[Mapping[str, Any]], directory: Path) -> bool:
    configs = [
        read_json(directory / str(module.get("path", "")) / "config.json") for module in modules
    ]
    return all((config or {}).get("include_prompt") is not False for config in configs)


def _without_prompt(
    encoder: Mapping[str, Any], prompts: list[str], directory: Path
) -> dict[str, Any]:
    """The keys of texts that have a prompt, where it is read and not pooled."""
    how = (encoder.get("span"), encoder.get("pooling"))
    if how == ("last_token", "mean"):
        return {}
    # Weights are counted from the view's first token there, and [CLS] is left out with the prompt.
    if how not in (("all", "mean"), ("all", "max")):
        raise ModelError(
            f"{directory}: pooling that leaves the prompt out (include_prompt: false) is available"
            " for mean, max and lasttoken only"
        )
    tokenizer = read_tokenizer(directory)
    for prompt in prompts:
        if not _ends_a_token(tokenizer, prompt):
            raise ModelError(
                f"{directory}: the prompt {prompt!r} is to be left out of pooling, but its last"
                " token merges with the text's first in this tokenizer, which is not available in"
                " this version"
            )
    return {"span": "from_text"}


def _ends_a_token(tokenizer: Tokenizer, prompt: str) -> bool:
    """Whether a prompt has as many tokens alone, but for closing ones, as stand before a text."""
    alone = tokenizer.encode(prompt)
    closing = sum(alone.special_tokens_mask[-1:])
    starts = {tokenizer.encode(prompt + w).char_to_token(len(prompt)) for w in _FIRST_WORDS}
    return starts == {len(alone.ids) - closing}


def _roles(prompts: Mapping[str, str], pooled: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        role: next((prompts[name] for name in names if name in prompts), None)
        for role, names in _ROLE_PROMPTS.items()
    }
    return {
        role: {"templates": [_template(text)], **pooled} for role, text in found.items() if text
    }


def _template(prompt: str) -> str:
    return prompt.replace("{", "{{").replace("}", "}}") + "{text}"
