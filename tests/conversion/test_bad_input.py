"""Every bad input: one line that names the thing, and nothing half-written."""

import json
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2r_conversion import read_source, write, writer
from tests.conversion.tiny import convert, plan_conversion

from . import tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    return tiny.llama(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    return tiny.llama(tmp_path / "source", shard_size="20KB")


def refuse(source, *needles, out="out", **options):
    """Convert, expect a one-line ValueError with all needles, and nothing new beside the source."""
    folder = source.parent
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError) as caught:
        convert(source, folder / out, **options)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message
    assert sorted(folder.iterdir()) == before


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_shard(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    shards[2].unlink()
    refuse(sharded, INDEX, shards[1].name, shards[2].name, "download")


def test_index_names_a_shard_that_is_not_there(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=weight_map | {"model.norm.weight": "model-00099.safetensors"})
    refuse(sharded, INDEX, "model-00099.safetensors")


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_index_that_points_outside(sharded, path):
    edit(sharded / INDEX, weight_map={"model.norm.weight": path})
    refuse(sharded, INDEX, "outside", path)


def test_index_that_names_the_wrong_shard(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map["model.norm.weight"])
    edit(sharded / INDEX, weight_map=weight_map | {"model.norm.weight": other})
    refuse(sharded, INDEX, "model.norm.weight")


@pytest.mark.parametrize("content", ["[1]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 5}}'])
def test_index_that_is_no_index(sharded, content):
    (sharded / INDEX).write_text(content)
    refuse(sharded, INDEX)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_shard(sharded, size):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:size])
    refuse(sharded, shard.name, "truncated", "download")


def test_no_weights(source):
    (source / "model.safetensors").unlink()
    (source / "optimizer.bin").unlink()
    refuse(source, str(source), "model.safetensors")


def test_only_pickles(source):
    (source / "model.safetensors").rename(source / "weights.bin")
    refuse(source, "pickled", "pytorch_model.bin is", "convert them to safetensors")


def test_no_config(source):
    (source / "config.json").unlink()
    refuse(source, "config.json", "no such file")


def test_config_that_is_not_json(source):
    (source / "config.json").write_text("{")
    refuse(source, "config.json", "not JSON")


def test_no_such_folder(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "no such folder")
    refuse(tmp_path / "nowhere.gguf", "nowhere.gguf", "no such file")


@pytest.mark.parametrize("model_type", ["gpt2", "no-such-model", None, ["llama"]])
def test_unsupported_family_is_refused_before_anything_else(source, model_type):
    edit(source / "config.json", model_type=model_type)
    (source / "model.safetensors").unlink()
    refuse(source, "config.json", repr(model_type), "llama, mistral")


def test_model_without_a_language_head(source):
    edit(source / "config.json", architectures=["LlamaForSequenceClassification"])
    refuse(source, "LlamaForSequenceClassification", "LlamaForCausalLM")


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"num_key_value_heads": 0}, {"hidden_size": "wide"}],
)
def test_configuration_that_does_not_add_up(source, change):
    edit(source / "config.json", **change)
    refuse(source, next(iter(change)).removeprefix("num_").split("_")[0])


def test_no_heads_at_all(source):
    edit(source / "config.json", num_attention_heads=0)
    refuse(source, "config.json", "zero")


def test_all_wrong_tensors_at_once(source):
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    weights["lm_head.weight"] = torch.zeros(95, 32)
    weights["model.layers.0.input_layernorm.weight"] = torch.zeros(31)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    weights["model.layers.0.self_attn.q_proj.scale"] = torch.zeros(1)
    weights["model.layers.9.stray.weight"] = torch.zeros(1)
    save_file(weights, source / "model.safetensors")
    refuse(
        source,
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "2 unexpected: model.layers.0.self_attn.q_proj.scale, model.layers.9.stray.weight",
        "2 of the wrong shape",
        "lm_head.weight [95, 32] instead of [96, 32]",
        "model.layers.0.input_layernorm.weight [31] instead of [32]",
        "1 of a dtype other than F32, F16, BF16: model.layers.0.self_attn.q_proj.weight I8",
    )


def test_slots_that_do_not_exceed_sinks(source):
    refuse(source, "num_sinks", num_slots=8, num_sinks=8)


def test_existing_output(source):
    (source.parent / "out").mkdir()
    refuse(source, "out", "exists already")


def test_output_that_is_no_model_is_never_replaced(source):
    (source.parent / "out").mkdir()
    (source.parent / "out" / "thesis.txt").write_text("years of work")
    refuse(source, "not a model's folder", overwrite=True)
    assert (source.parent / "out" / "thesis.txt").exists()


def test_output_that_holds_the_source_is_never_replaced(source):
    refuse(source, "holds the source", out="source", overwrite=True)
    assert (source / "model.safetensors").exists()


def test_full_disk_is_noticed_before_writing(source, monkeypatch):
    def no_copy(*_):
        raise AssertionError("wrote to a disk that is too full")

    needed = sum(tensor.nbytes for tensor in tiny.load_all(source).values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(0, 0, needed))
    monkeypatch.setattr(writer.shutil, "copyfile", no_copy)
    refuse(source, "bytes needed", f"{needed:,} free")
    with pytest.raises(ValueError, match="bytes needed"):
        write(plan_conversion(read_source(source)), source.parent / "out")
    assert list(source.parent.iterdir()) == [source]
