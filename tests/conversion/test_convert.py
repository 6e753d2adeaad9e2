import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.export import AUTO_MAP, code_files
from t2r_conversion import open_source, read_source, write, writer
from tests.conversion.tiny import convert, plan_conversion

from . import tiny


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("make", tiny.UNTOUCHED)
@pytest.mark.parametrize("tied", [True, False])
def test_untouched_shards_are_byte_identical(tmp_path, make, shard_size, tied):
    source = make(tmp_path / "source", shard_size=shard_size, tie_word_embeddings=tied)
    convert(source, tmp_path / "out", num_slots=8)
    before, after = tiny.hashes(source), tiny.hashes(tmp_path / "out")
    assert len(before) > 2 or shard_size == "5GB"
    assert after[:-1] == before
    assert len(after) == len(before) + 1


def test_output_folder(tmp_path):
    source = tiny.llama(tmp_path / "source", dtype=torch.bfloat16, attention_bias=True)
    convert(source, tmp_path / "deep" / "out", num_slots=8, keep_softmax=[1])
    out = tmp_path / "deep" / "out"
    assert names(out.parent) == ["out"]
    assert set(names(out)) >= code_files().keys()
    assert [name for name in names(out) if not name.endswith(".py")] == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "t2r_record.json",
        "tokenizer.json",
    ]
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"], raw["dtype"]) == (["T2RForCausalLM"], "t2r", "bfloat16")
    assert raw["auto_map"] == AUTO_MAP
    config = T2RConfig.from_pretrained(out)
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert config.attention_out_bias
    record = json.loads((out / "t2r_record.json").read_text())["conversion"]
    assert (record["source"], record["family"], record["keep_softmax"]) == ("source", "llama", [1])
    assert str(tmp_path) not in json.dumps(record)


def test_index_agrees_with_the_shards(tmp_path):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    convert(source, tmp_path / "out", num_slots=8)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.stat().st_mode == (shard.parent / "config.json").stat().st_mode
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held.update(dict.fromkeys(file.keys(), shard.name))
    assert index["weight_map"] == held
    tensors = tiny.load_all(tmp_path / "out").values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors)


def test_new_tensors(tmp_path):
    source = tiny.llama(tmp_path / "source", dtype=torch.float16)
    convert(source, tmp_path / "window", num_slots=8)
    convert(source, tmp_path / "paper", num_slots=8, start="paper")
    convert(source, tmp_path / "again", num_slots=8, start="paper")
    window, paper = tiny.load_all(tmp_path / "window"), tiny.load_all(tmp_path / "paper")
    attention = "model.layers.1.self_attn."
    assert window[attention + "f_proj.weight"].dtype == torch.float16
    assert not window[attention + "f_proj.weight"].any()
    assert not window[attention + "f_proj.bias"].any()
    assert paper[attention + "f_proj.weight"].float().std() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(paper[attention + "f_proj.weight"], paper["model.layers.0.self_attn.f_proj.weight"])
    assert (paper[attention + "g_norm.weight"] == 1).all()
    assert tiny.hashes(tmp_path / "paper") == tiny.hashes(tmp_path / "again")


def test_no_extra_shard_when_every_layer_stays_softmax(tmp_path):
    source = tiny.llama(tmp_path / "source")
    convert(source, tmp_path / "out", keep_softmax=range(3))
    assert tiny.hashes(tmp_path / "out") == tiny.hashes(source)


def test_only_shards_with_dropped_tensors_are_rewritten(tmp_path):
    source = tiny.llama(tmp_path / "source", tie_word_embeddings=True, shard_size="20KB", dtype=torch.bfloat16)
    shards = sorted(source.glob("*.safetensors"))
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    original = tiny.load_all(source)
    tiny.add_tensors(shards[0], **{inv_freq: torch.arange(3.0)})
    tiny.add_tensors(shards[-1], lm_head__weight=original["model.embed_tokens.weight"].clone())
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {inv_freq: shards[0].name, "lm_head.weight": shards[-1].name}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    plan = convert(source, tmp_path / "out", num_slots=8)
    assert {tensor.name for tensor in plan.having("dropped")} == {inv_freq, "lm_head.weight"}
    written = tiny.load_all(tmp_path / "out")
    assert set(written) == set(original) | {tensor.name for tensor in plan.having("new")}
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert int.from_bytes(shard.read_bytes()[:8], "little") % 8 == 0  # the header's length: data stay aligned
    assert tiny.hashes(tmp_path / "out")[1 : len(shards) - 1] == tiny.hashes(source)[1:-1]


def test_shard_with_nothing_to_keep_disappears(tmp_path):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    kept = len(set(index["weight_map"].values()))
    save_file({"model.rotary_emb.inv_freq": torch.zeros(4)}, source / "model-extra.safetensors")
    index["weight_map"]["model.rotary_emb.inv_freq"] = "model-extra.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "out", num_slots=8)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == kept + 1


def test_dry_run_writes_nothing(tmp_path):
    source = tiny.llama(tmp_path / "source")
    plan = convert(source, tmp_path / "out", dry_run=True)
    assert names(tmp_path) == ["source"]
    assert plan.totals()["new"]["tensors"] == 6


def test_progress_ends_at_the_total(tmp_path):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    calls = []
    plan = convert(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.bytes for tensor in plan.having("copied", "new"))
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_overwrite_replaces_the_whole_folder(tmp_path):
    source = tiny.llama(tmp_path / "source")
    convert(source, tmp_path / "out", num_slots=8)
    (tmp_path / "out" / "stale.txt").write_text("old")
    with pytest.raises(ValueError, match="exists already"):
        convert(source, tmp_path / "out", num_slots=16)
    convert(source, tmp_path / "out", num_slots=16, overwrite=True)
    assert T2RConfig.from_pretrained(tmp_path / "out").num_slots == 16
    assert "stale.txt" not in names(tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["_write_new", "_replace"])
def test_interrupted_conversion_leaves_nothing_and_runs_again(tmp_path, monkeypatch, interruption, where):
    source = tiny.llama(tmp_path / "source")
    convert(source, tmp_path / "out", num_slots=8)

    def interrupt(*_):
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(writer, where, interrupt)
        for out, overwrite in (("fresh", False), ("out", True)):
            with pytest.raises(interruption):
                convert(source, tmp_path / out, num_slots=16, overwrite=overwrite)
    assert names(tmp_path) == ["out", "source"]
    assert T2RConfig.from_pretrained(tmp_path / "out").num_slots == 8
    convert(source, tmp_path / "fresh", num_slots=16)
    assert T2RConfig.from_pretrained(tmp_path / "fresh").num_slots == 16


def test_old_model_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    source = tiny.llama(tmp_path / "source")
    convert(source, tmp_path / "out", num_slots=8)
    path_class = type(tmp_path)
    rename = path_class.rename

    def fail(path, target):
        if path.name == ".out.partial":
            raise OSError
        return rename(path, target)

    monkeypatch.setattr(path_class, "rename", fail)
    with pytest.raises(OSError):
        convert(source, tmp_path / "out", num_slots=16, overwrite=True)
    assert T2RConfig.from_pretrained(tmp_path / "out").num_slots == 8
    assert names(tmp_path) == ["out", "source"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    source = tiny.llama(tmp_path / "source")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00002.safetensors").write_text("half")
    convert(source, tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


def test_files_of_a_temporary_source_are_moved(tmp_path):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    before = tiny.hashes(source)
    with open_source(source) as opened:
        plan = plan_conversion(replace(opened, temporary=True), num_slots=8)
        write(plan, tmp_path / "out")
    assert tiny.hashes(tmp_path / "out")[:-1] == before
    assert not list(source.glob("*.safetensors"))


def test_old_rope_fields_become_rope_parameters(tmp_path):
    source = tiny.llama(tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 7000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (source / "config.json").write_text(json.dumps(raw))
    rope = plan_conversion(read_source(source)).config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (7000.0, "linear", 4.0)


def test_mixed_dtypes_keep_theirs(tmp_path):
    source = tiny.llama(tmp_path / "source", dtype=torch.bfloat16)
    tiny.add_tensors(source / "model.safetensors", model__norm__weight=torch.ones(32))
    plan = convert(source, tmp_path / "out")
    assert plan.dtype == torch.bfloat16
    written = tiny.load_all(tmp_path / "out")
    assert written["model.norm.weight"].dtype == torch.float32
    assert written["model.layers.0.self_attn.f_proj.weight"].dtype == torch.bfloat16


def test_source_is_left_as_it_was(tmp_path):
    source = tiny.llama(tmp_path / "source")
    shutil.copytree(source, tmp_path / "copy")
    convert(source, tmp_path / "out")
    for file in source.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("card", "licence"),
    [("---\nlicense: mit\n---\nWords.", "mit"), ("No front matter.", None), ("---\n: [\n---\n", None)],
)
def test_the_licence_comes_from_the_sources_card(tmp_path, card, licence):
    source = tiny.llama(tmp_path / "source")
    (source / "README.md").write_text(card)
    convert(source, tmp_path / "out", num_slots=8)
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())
    assert record["conversion"]["license"] == licence
    assert not (tmp_path / "out" / "README.md").exists()
