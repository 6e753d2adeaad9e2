import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from t2r.model import T2RForCausalLM
from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion import FAMILIES, read_source
from tests.conversion.tiny import plan_conversion

from . import tiny

MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("mistral", {"head_dim": 24, "tie_word_embeddings": True}),
    ],
)
def test_table_is_the_models_own(family, changes):
    config_class, model_class = MODELS[family]
    config = config_class(**tiny.SHAPE | changes)
    with torch.device("meta"):
        state = model_class(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    converted = T2RConfig(**FAMILIES[family].config_values(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert FAMILIES[family].expected_tensors(converted) == shapes


def test_config_fields_follow_the_source():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = LlamaConfig(
        **tiny.SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=rope, rms_norm_eps=1e-4, eos_token_id=[2, 7]
    )
    converted = T2RConfig(**FAMILIES["llama"].config_values(config))
    assert (converted.attention_bias, converted.attention_out_bias, converted.mlp_bias) == (True, True, True)
    assert converted.rope_parameters == rope
    assert converted.rms_norm_eps == 1e-4
    assert converted.eos_token_id == [2, 7]
    assert {name: getattr(converted, name) for name in tiny.SHAPE} == tiny.SHAPE


def test_mistral_keeps_its_window_and_has_no_bias():
    converted = T2RConfig(**FAMILIES["mistral"].config_values(MistralConfig(**tiny.SHAPE, sliding_window=48)))
    assert converted.sliding_window == 48
    assert (converted.attention_bias, converted.attention_out_bias, converted.mlp_bias) == (False, False, False)


@pytest.mark.parametrize("start", ["window", "paper"])
@pytest.mark.parametrize("tied", [True, False])
def test_planned_tensors_are_those_of_the_converted_model(tmp_path, start, tied):
    source = tiny.llama(tmp_path / "source", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    plan = plan_conversion(read_source(source), start=start, num_slots=8, keep_softmax=[1])
    with torch.device("meta"):
        state = T2RForCausalLM(plan.config).state_dict()
    if tied:
        state.pop("lm_head.weight")
    planned = {tensor.name: tensor.shape for tensor in plan.having("copied", "new")}
    assert planned == {name: tuple(tensor.shape) for name, tensor in state.items()}
