import pytest
from transformers.models.auto import modeling_auto

from embedjob.encoder.facts import ENCODER_TYPES, ModelFacts, facts_of, is_causal
from embedjob.errors import ModelError
from tests.encoder import tiny

# In transformers' list of masked models, and yet not encoders alone.
NOT_ENCODERS = {"bart", "mbart", "mvp", "reformer"}


def test_every_masked_model_that_transformers_knows_is_an_encoder() -> None:
    known = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert known - NOT_ENCODERS <= ENCODER_TYPES


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_kind_is_told_by_the_config(name: str) -> None:
    found = facts_of(tiny.config(name).to_dict())
    assert (found.hidden_size, found.layers, found.causal) == (32, 2, name in tiny.DECODERS)


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "llama", "is_causal": False}, False),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, False),
        ({"model_type": "bert", "is_decoder": True}, True),
        ({"model_type": "one that nobody knows"}, True),
    ],
)
def test_a_config_may_say_otherwise_than_its_kind(config: dict[str, object], causal: bool) -> None:
    assert is_causal(config) is causal


def test_the_text_part_of_a_larger_model_counts() -> None:
    inner = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}
    assert facts_of({"model_type": "pictures", "text_config": inner}) == ModelFacts(
        8, 3, True, None, None
    )


def test_an_encoder_with_a_decoder_is_refused() -> None:
    sizes = {"d_model": 8, "num_hidden_layers": 2, "is_encoder_decoder": True}
    assert facts_of({"model_type": "t5", **sizes}).causal is False
    with pytest.raises(ModelError, match="bart models have an encoder and a decoder"):
        facts_of({"model_type": "bart", **sizes})


def test_a_config_that_tells_no_size_is_refused() -> None:
    with pytest.raises(ModelError, match="tells no hidden size"):
        facts_of({"model_type": "clip"})
