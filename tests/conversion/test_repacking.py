"""Weights in another dtype, and in shards of another size."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2r.model import T2RForCausalLM

from . import tiny
from .tiny import convert


def shards(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype(tmp_path, dtype):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    plan = convert(source, tmp_path / "out", num_slots=8, dtype=dtype)
    to, before, after = getattr(torch, dtype), tiny.load_all(source), tiny.load_all(tmp_path / "out")
    assert plan.dtype == to
    assert all(torch.equal(after[name], tensor.to(to)) for name, tensor in before.items())
    assert all(tensor.dtype == to for tensor in after.values())
    assert len(shards(tmp_path / "out")) == len(shards(source)) + 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert T2RForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == to
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    unchanged = 0 if dtype != "float32" else len(shards(source))
    assert record["shards"].get("copied", 0) + record["shards"].get("cloned", 0) == unchanged


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_fused_projections_are_taken_apart(tmp_path, size, dtype):
    source = tiny.phi3(tmp_path / "source", shard_size=size)
    plan = convert(source, tmp_path / "out", num_slots=8, dtype=dtype, hard_link=True)
    before, after = tiny.load_all(source), tiny.load_all(tmp_path / "out")
    together = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, tensor in before.items():
        *path, module, weight = name.rsplit(".", 2)
        parts = [after.pop(".".join([*path, part, weight])) for part in together.get(module, (module,))]
        assert torch.equal(torch.cat(parts), tensor.to(plan.dtype)), name
    assert set(after) == {tensor.name for tensor in plan.having("new")}
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    whole = sum("qkv_proj" not in name and "up_proj" not in name for shard in shards(source).values() for name in shard)
    assert plan.totals()["copied"]["tensors"] == whole + 3 * 5  # layers, and what is taken apart in each
    untouched = [s for s in shards(source).values() if not any("qkv" in name or "gate_up" in name for name in s)]
    assert record["shards"].get("linked", 0) == (len(untouched) if dtype is None else 0)


def test_fused_projections_of_another_size_are_refused(tmp_path):
    source = tiny.phi3(tmp_path / "source")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name][:-3].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of the wrong shape: \S+v_proj\.weight \[13, 32\]"):
        convert(source, tmp_path / "out", num_slots=8)
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"3 missing: model\.layers\.1\.self_attn\.q_proj\.weight"):
        convert(source, tmp_path / "out", num_slots=8)


@pytest.mark.parametrize("size", [1, 5_000, 10**9])
def test_shards_of_a_size(tmp_path, size):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    convert(source, tmp_path / "out", num_slots=8, max_shard_size=size)
    before, after = tiny.load_all(source), tiny.load_all(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    *kept, new = shards(tmp_path / "out").values()
    assert {name for shard in kept for name in shard} == set(before)
    assert not set(new) & set(before)
    for shard in kept:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= size
    assert len(kept) == {1: len(before), 10**9: 1}.get(size, len(kept))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a dict)


def test_a_number_too_large_for_a_dtype_is_told(tmp_path):
    source = tiny.llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: 7e\+04 is too large for F16"):
        convert(source, tmp_path / "out", num_slots=8, dtype="float16")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", num_slots=8, dtype="bfloat16")


def test_an_unknown_dtype_is_told(tmp_path):
    source = tiny.llama(tmp_path / "source")
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; choose one of float32, float16, bfloat16"):
        convert(source, tmp_path / "out", num_slots=8, dtype="int8")
