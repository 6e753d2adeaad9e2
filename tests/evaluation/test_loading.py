import json
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2r.evaluation import load_model, load_tokenizer, loading, resolve_device
from t2r.evaluation.loading import record_of
from t2r.model import T2RForCausalLM
from tests.tiny import tiny_llama, tiny_t2r


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("make", [tiny_llama, tiny_t2r])
def test_local_folders_load_as_they_were_saved(tmp_path, make):
    saved = make(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert type(loaded) is type(saved)
    assert not loaded.training
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(loaded(tokens).logits, saved(tokens).logits)
    assert load_tokenizer(tmp_path)("the cat")["input_ids"] == [3, 5]


def test_dtype_is_float32_on_the_cpu_unless_asked_for(tmp_path):
    tiny_t2r(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.float32
    assert load_model(tmp_path, dtype="own", device="cpu").dtype == torch.bfloat16
    model = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert isinstance(model, T2RForCausalLM)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./none", "./none: no such folder$"),
        ("/none/at/all", "no such folder$"),
        ("none.gguf", "no such GGUF file"),
        ("not an id", "no such folder, and no Hub id either"),
        ("nobody/nothing", "no such folder, and the Hub does not answer"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_models_that_are_not_there(load, source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


def test_a_missing_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"runs/none: no such folder$"):
        load_model("runs/none")


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"t2r merge {tmp_path} -o OUT"):
        load_model(tmp_path)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "model.bin")


def test_missing_tensors_are_named_and_not_made_up(tmp_path):
    tiny_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"):
        load_model(tmp_path)


def test_truncated_weights(tmp_path):
    tiny_llama(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{tmp_path}: the model cannot be loaded"):
        load_model(tmp_path)


def test_tensors_of_another_shape(tmp_path):
    tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=f"{tmp_path}: the model cannot be loaded"):
        load_model(tmp_path)


def test_damaged_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(12))
    with pytest.raises(ValueError, match=r"model\.gguf: the model cannot be loaded"):
        load_model(tmp_path / "model.gguf")


def test_a_folder_without_tokenizer(tmp_path):
    tiny_llama(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)


def test_devices_and_dtypes_that_are_not_there(tmp_path):
    tiny_llama(tmp_path)
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device 'abacus' is unknown"):
        load_model(tmp_path, device="abacus")
    with pytest.raises(ValueError, match="device 'cuda:99': torch finds"):
        load_model(tmp_path, device="cuda:99")
    with pytest.raises(ValueError, match="dtype 'int4' is unknown; use one of auto, own, float32"):
        load_model(tmp_path, dtype="int4")


def test_a_model_without_a_record_has_none(tmp_path, monkeypatch):
    tiny_t2r(tmp_path)
    assert record_of(tmp_path) == {}
    monkeypatch.setattr(loading, "locate", lambda source: (source, {}))
    assert record_of("me/tiny") == {}  # nor one that the Hub does not give out
