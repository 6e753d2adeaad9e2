import pytest
import torch
from safetensors.torch import load_file, save_file

import t2r_conversion
from t2r.evaluation import load_model, verify_conversion
from tests.tiny import tiny_llama, tiny_text


@pytest.fixture
def pair(tmp_path):
    tiny_llama(tmp_path / "source")
    options = {"num_slots": 16, "num_sinks": 2, "gate_write": 30.0, "gate_keep": 30.0}
    t2r_conversion.convert(tmp_path / "source", tmp_path / "out", start="window", **options)
    return tmp_path / "source", tmp_path / "out"


def test_a_conversion_is_verified(pair):
    found = verify_conversion(*pair, tiny_text(100), tokens=60)
    assert found.tokens == 60
    assert found.softmax < 1e-4
    assert found.slots < 1e-3  # gates are exact, and 16 slots hold 16 tokens
    source, student = (load_model(folder, dtype="float32") for folder in pair)
    with torch.no_grad():
        from t2r.evaluation import load_tokenizer

        ids = torch.tensor(load_tokenizer(pair[1])(tiny_text(100))["input_ids"][:60])[None]
        same = (source(ids).logits.argmax(-1) == student(ids).logits.argmax(-1)).float().mean().item()
    assert found.agreement == pytest.approx(same)


def test_damage_is_found(pair):
    (shard,) = (path for path in pair[1].glob("*.safetensors") if "model.norm.weight" in load_file(path))
    save_file(load_file(shard) | {"model.norm.weight": torch.zeros(load_file(shard)["model.norm.weight"].shape)}, shard)
    with pytest.raises(ValueError, match="of their spread from those of"):
        verify_conversion(*pair, tiny_text(100))


def test_there_must_be_something_to_compare(pair):
    with pytest.raises(ValueError, match="no two tokens"):
        verify_conversion(*pair, "")
    with pytest.raises(ValueError, match="a llama model, not a converted one"):
        verify_conversion(pair[0], pair[0], tiny_text(50))
