import json

import pytest
import torch

from t2r.hub import model_facts
from tests.tiny import SHAPE, tiny_llama, tiny_t2r, write_record


def test_figures_are_those_of_the_model(tmp_path):
    model = tiny_t2r(tmp_path)
    write_record(tmp_path, conversion={"source": "x"})
    facts = model_facts(tmp_path)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.weight_bytes == 4 * facts.parameters
    assert facts.state_bytes == 4 * model.config.state_elements() == model.config.state_bytes(2)
    assert facts.memory_bytes == {2048: facts.state_bytes, 32768: facts.state_bytes}
    assert (facts.start, facts.slots, facts.sinks, facts.window) == ("window", 8, 2, None)
    assert facts.layers == {"linear_attention": 2}
    assert facts.record == {"conversion": {"source": "x"}}
    json.dumps(facts.as_dict())


def test_a_window_beside_the_slots_counts(tmp_path):
    model = tiny_t2r(tmp_path, hybrid_window=5, layer_types=["hybrid_sliding", "linear_attention"])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    facts = model_facts(tmp_path)
    slots = 2 * 2 * 8 * 2 * 8 * 4  # layers x heads x slots x keys and values x width x fp32
    token = 2 * ((2 * 8 + 8) * 2 + 4)  # heads x (keys, values and logits x bf16, and a number)
    assert (facts.window, facts.state_bytes) == (5, slots + 5 * token)
    assert facts.memory_bytes[32768] == facts.state_bytes
    assert facts.layers == {"hybrid_sliding": 1, "linear_attention": 1}


def test_softmax_models_have_a_cache_and_no_slots(tmp_path):
    tiny_llama(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    facts = model_facts(tmp_path)
    assert (facts.start, facts.slots, facts.sinks, facts.state_bytes) == (None, None, None, 0)
    assert facts.dtype == "BF16"
    head_dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    cache = SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 2 * head_dim * 2
    assert facts.memory_bytes == facts.softmax_bytes == {2048: 2048 * cache, 32768: 32768 * cache}


def test_weights_in_shards(tmp_path):
    model = tiny_t2r(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    facts = model_facts(tmp_path)
    assert facts.shards > 1
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="names shards that are not there"):
        model_facts(tmp_path)


def test_damaged_weights(tmp_path):
    tiny_t2r(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        model_facts(tmp_path)


def test_damaged_index(tmp_path):
    tiny_t2r(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        model_facts(tmp_path)


def test_a_field_of_a_wrong_type(tmp_path):
    tiny_t2r(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_slots": "many"}))
    with pytest.raises(ValueError, match=r"config\.json: "):
        model_facts(tmp_path)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        model_facts(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no config\.json"):
        model_facts(tmp_path)
    tiny_t2r(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        model_facts(tmp_path)
