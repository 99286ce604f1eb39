"""Tokenizers: read from a model's files, without its weights."""

from pathlib import Path

from tokenizers import Tokenizer

from embedjob.config.recipe import Recipe
from embedjob.errors import EmbedjobError, ModelError
from embedjob.models.architecture import config_of, info_of
from embedjob.models.source import materialize, source_of, transformer_directory
from embedjob.models.tables.static_tables import lookup, static_table
from embedjob.models.tokenizer_files import bare, read_files
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenizesTexts


def load_tokenizer(recipe: Recipe) -> TokenizesTexts:
    """Return the recipe's tokenizer; its files are fetched once per node, weights are not.

    That of a static table looks texts up in it.
    """
    directory = materialize(source_of(recipe), tokenizer_only=True)
    table = static_table(directory)
    if table is not None:
        split = recipe.split if recipe.long_text == "split" else None
        return lookup(table, max_tokens=recipe.max_tokens, split=split)
    tokenizer, info = read_tokenizer(directory), info_of(config_of(directory))
    views = ViewTokenizer(
        tokenizer, recipe, eos_id=_eos_id(directory), positions=info.max_positions
    )
    _check_token_rows(recipe, tokenizer, info.vocabulary)
    return views


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a model directory as transformers does, without truncation, padding."""
    inner = transformer_directory(directory)
    path = read_files(inner).path
    try:
        return bare(Tokenizer.from_file(str(path)))
    except EmbedjobError:
        raise  # a signal, which ends the run
    except Exception as error:
        # The library raises bare Exception, with the reason and without the path.
        raise ModelError(f"encoder.model: no tokenizer can be read in {inner}: {error}") from error


def lowercases(directory: Path) -> bool:
    """Tell whether a model's tokenizer lowercases texts."""
    normalizer = read_tokenizer(directory).normalizer
    return normalizer is not None and normalizer.normalize_str("É A") == normalizer.normalize_str(
        "é a"
    )


def _check_token_rows(recipe: Recipe, tokenizer: Tokenizer, rows: int | None) -> None:
    """Raise ModelError if a token that the recipe adds has no embedding."""
    if recipe.adapters:
        return  # Adapters may add rows; a token without a row is refused when it reaches the model.
    for token in recipe.special_tokens.add:
        number = tokenizer.token_to_id(token)
        if rows is not None and number is not None and number >= rows:
            raise ModelError(
                f"encoder.special_tokens.add: got {token!r}, which would be token {number} of"
                f" {recipe.model}, which embeds {rows} tokens only; allowed are tokens that its"
                " tokenizer has, or that its weights have rows for. Use the model that was trained"
                " with it"
            )


def _eos_id(directory: Path) -> int | None:
    """Return the end-of-text token by config.json, the first of several."""
    config = config_of(directory)
    eos = {**config, **(config.get("text_config") or {})}.get("eos_token_id")
    return (eos[0] if eos else None) if isinstance(eos, list) else eos
