import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from t2r.model import T2RForCausalLM
from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion import FAMILIES, SourceTensor, read_source
from tests.conversion.tiny import plan_conversion

from . import tiny

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 4.0, 9.0],
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("mistral", {"head_dim": 24, "tie_word_embeddings": True}),
        ("phi3", {}),
        ("phi3", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 24}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_table_is_the_models_own(family, changes):
    config_class, model_class = tiny.MODELS[family]
    config = config_class(**tiny.SHAPE | changes)
    with torch.device("meta"):
        state = model_class(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    converted = T2RConfig(**FAMILIES[family].config_values(config))
    headers = {name: SourceTensor(tuple(tensor.shape), "F32", "model.safetensors") for name, tensor in state.items()}
    apart = FAMILIES[family].taken_apart(headers, config)
    assert FAMILIES[family].expected_tensors(converted) == {name: header.shape for name, header in apart.items()}


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


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny.llama, {"attention_bias": True, "mlp_bias": True}),
        (tiny.mistral, {"sliding_window": 20}),
        (tiny.phi3, {}),
        (tiny.phi3, {"sliding_window": 20, "tie_word_embeddings": True}),
        (tiny.phi3, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        (tiny.phi3, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}),
        (tiny.qwen2, {}),
        (tiny.qwen2, {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
        (tiny.qwen3, {"attention_bias": True}),
        (tiny.qwen3, {"tie_word_embeddings": True}),
    ],
)
def test_a_converted_model_is_its_source(tmp_path, make, options):
    """On contexts that the slots hold, and with softmax attention on longer ones."""
    source = make(tmp_path / "source", **options)
    tiny.convert(source, tmp_path / "out", num_slots=16, gate_write=30.0, gate_keep=30.0)
    model, teacher = (
        kind.from_pretrained(tmp_path / name)
        for kind, name in ((T2RForCausalLM, "out"), (AutoModelForCausalLM, "source"))
    )
    x = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(x).logits
        short, expected_short = (kind(x[:, :16]).logits for kind in (model, teacher))
        with model.softmax_attention():
            long = model(x).logits
    scale = expected.std()
    assert (short - expected_short).abs().max() < 1e-3 * scale
    assert (long - expected).abs().max() < 1e-3 * scale


def test_windows_in_some_layers_are_refused():
    config = Qwen2Config(**tiny.SHAPE, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    with pytest.raises(ValueError, match="qwen2: layers of several kinds"):
        FAMILIES["qwen2"].config_values(config)


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
