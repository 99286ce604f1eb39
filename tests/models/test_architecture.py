import pytest
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.models.auto import modeling_auto

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.errors import ModelError
from embedjob.models.architecture import ENCODER_TYPES, ModelInfo, check_model, info_of, is_causal
from tests.encoder import tiny

# In transformers' list of masked models, and yet not encoders alone.
NOT_ENCODERS = {"bart", "mbart", "mvp", "reformer"}


def test_every_masked_model_that_transformers_knows_is_an_encoder() -> None:
    known = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert known - NOT_ENCODERS <= ENCODER_TYPES


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_kind_is_told_by_the_config(name: str) -> None:
    found = info_of(tiny.config(name).to_dict())
    assert (found.hidden_size, found.layers, found.causal) == (32, 2, name in tiny.DECODERS)


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "llama", "is_causal": False}, False),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, False),
        ({"model_type": "embedding_gemma2", "text_config": {}}, False),
        ({"model_type": "embedding_gemma2_text"}, False),
        ({"model_type": "bert", "is_decoder": True}, True),
        ({"model_type": "one that nobody knows"}, True),
    ],
)
def test_a_config_may_say_otherwise_than_its_kind(config: dict[str, object], causal: bool) -> None:
    assert is_causal(config) is causal


def test_the_text_part_of_a_larger_model_counts() -> None:
    inner = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}
    assert info_of({"model_type": "pictures", "text_config": inner}) == ModelInfo(
        8, 3, True, None, None
    )


def test_an_encoder_with_a_decoder_is_refused() -> None:
    sizes = {"d_model": 8, "num_hidden_layers": 2, "is_encoder_decoder": True}
    assert info_of({"model_type": "t5", **sizes}).causal is False
    with pytest.raises(ModelError, match="bart models have an encoder and a decoder"):
        info_of({"model_type": "bart", **sizes})


def test_a_config_that_tells_no_size_is_refused() -> None:
    with pytest.raises(ModelError, match="has no hidden size"):
        info_of({"model_type": "clip"})


@pytest.mark.parametrize(
    ("told", "most"),
    [
        ({"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope"}}, 32),
        ({"original_max_position_embeddings": 32, "rope_scaling": {"type": "su"}}, 32),
        ({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 40}}, 40),
        (
            {
                "rope_parameters": {
                    "a": {"rope_type": "longrope", "original_max_position_embeddings": 48},
                    "b": {"rope_type": "default"},
                }
            },
            48,
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, None),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, None),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}}, None),
    ],
)
def test_a_text_that_would_change_the_positions_of_others_is_too_long(
    told: dict[str, object], most: int | None
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 64}
    known = info_of({"model_type": "llama", **sizes, **told})
    assert (known.max_positions, known.length_bound) == (most or 64, most is not None)
    check_model(Recipe(model="that", max_tokens=most or 64), known)
    said = rf"got 65, but that has {most or 64} positions{': a longer' if most else ';'}"
    with pytest.raises(ModelError, match=rf"{said}.*set encoder.max_tokens: {most or 64}"):
        check_model(Recipe(model="that", max_tokens=65), known)


def test_within_the_bound_longrope_positions_are_those_of_the_view_alone() -> None:
    """And past it they are not: transformers takes the longest of a micro-batch for all."""
    half = tiny.GROUPED["head_dim"] // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 20,
    }
    torch.manual_seed(1)
    model = LlamaModel(LlamaConfig(**tiny.GROUPED, rope_parameters=rope)).eval()
    backbone = Backbone(model, attention="causal")
    assert backbone.info.max_positions == 20
    ids = torch.arange(3, 33)[None].repeat(2, 1)
    alone = backbone.states(ids[:1, :9], torch.ones(1, 9).bool(), layer=-1)[0]
    for longest in (20, 21):
        mask = torch.arange(longest) < torch.tensor([[9], [longest]])
        beside = backbone.states(ids[:, :longest], mask, layer=-1)[0, :9]
        assert torch.allclose(beside, alone, atol=1e-5) is (longest <= 20)
