"""flash-linear-attention's checkpoints in and out: the same logits, the same bytes, and no silent difference."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch

from t2r.model import T2RConfig, T2RForCausalLM
from t2r_conversion import convert, export_fla, plan_conversion, read_source
from t2r_conversion.headers import read_headers

from . import gsa, tiny
from .test_pickles import pickled

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
SOFTMAX = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": None, "rope_theta": 1e4}


def source(tmp_path, shards=1, dtype=torch.float32, **changes):
    """A checkpoint of release 0.6.0: folder, configuration, weights."""
    config = gsa.CONFIG | {"dtype": str(dtype).removeprefix("torch.")} | changes
    weights = gsa.weights(config, dtype)
    return gsa.write(tmp_path / "source", config, weights, shards), config, weights


def logits(folder):
    model = T2RForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        return model(IDS).logits


def error(actual, expected):
    """The largest difference, in standard deviations."""
    return ((actual - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": None, "tie_word_embeddings": True},
        {"num_slots": None, "gate_logit_normalizer": 16, "norm_eps": 1e-3},
        {"intermediate_size": None, "hidden_ratio": 2},
        {"attn": SOFTMAX},
        {"attn": [SOFTMAX | {"window_size": 5, "rope_theta": 500.0, "layers": layers} for layers in ([0], [2])]},
    ],
    ids=["plain", "tied", "slots", "ratio", "hybrid", "windows"],
)
def test_a_converted_model_is_its_source(tmp_path, changes):
    folder, config, weights = source(tmp_path, **changes)
    convert(folder, tmp_path / "out")
    assert error(logits(tmp_path / "out"), gsa.logits(config, weights, IDS)) < 1e-5


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_layout_of_2024(tmp_path, norm_first):
    config = gsa.CONFIG | gsa.OF_2024 | {"norm_first": norm_first}
    weights = gsa.weights(config)
    folder = gsa.write(tmp_path / "source", config, gsa.as_in_2024(weights, norm_first), shards=2)
    convert(folder, tmp_path / "out")
    assert error(logits(tmp_path / "out"), gsa.logits(config, weights, IDS, output_eps=1e-6)) < 1e-5
    export_with_warning(tmp_path / "out", tmp_path / "now", "epsilon 1e-06")
    exported = tiny.load_all(tmp_path / "now")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], x) for name, x in weights.items())


def export_with_warning(folder, out, message):
    with pytest.warns(UserWarning, match=message):
        export_fla(folder, out)


def test_the_epsilon_of_the_output_norm_matters_here(tmp_path):
    _, config, weights = source(tmp_path)
    assert error(gsa.logits(config, weights, IDS, output_eps=1e-6), gsa.logits(config, weights, IDS)) > 1e-5


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attn": SOFTMAX | {"window_size": 7}}])
def test_there_and_back(tmp_path, shards, dtype, changes):
    folder, config, weights = source(tmp_path, shards, dtype, **changes)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    convert(folder, tmp_path / "out")
    export_fla(tmp_path / "out", tmp_path / "back")
    back = tiny.load_all(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], x) and back[name].dtype == x.dtype for name, x in weights.items())
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert again == {name: config[name] for name in again}
    # What is not written has the value that release 0.6.0 takes by itself.
    assert {name: x for name, x in config.items() if name not in again} == {
        "attnres_block_size": None,
        "clamp_max": None,
        "clamp_min": None,
        "conv_size": 4,
        "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False,
        "fuse_norm": True,
        "fuse_swiglu": True,
        "hidden_ratio": 4,
        "use_l2warp": False,
    }
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out", "source"]


def test_a_model_of_our_own_goes_out_and_comes_back(tmp_path):
    shape = {**tiny.SHAPE, "num_slots": 6, "rms_norm_eps": 1e-5, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = T2RForCausalLM(T2RConfig(**shape, start="paper", layer_types=["linear_attention"] * 2 + ["full_attention"]))
    model.save_pretrained(tmp_path / "ours")
    export_fla(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    weights = tiny.load_all(tmp_path / "theirs")
    assert set(weights) == set(gsa.weights(gsa.CONFIG | config))
    assert error(logits(tmp_path / "ours"), gsa.logits(config, weights, IDS)) < 1e-5
    convert(tmp_path / "theirs", tmp_path / "again")
    before, after = tiny.load_all(tmp_path / "ours"), tiny.load_all(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_plan_and_record(tmp_path):
    folder, _, weights = source(tmp_path, shards=2, dtype=torch.bfloat16)
    plan = convert(folder, tmp_path / "planned", source_format="fla", dry_run=True)
    assert not (tmp_path / "planned").exists()
    convert(folder, tmp_path / "out", source_format="fla")
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert (record["family"], record["start"], record["num_slots"]) == ("gsa", "paper", 6)
    assert record["shards"] == {"written": 2}
    assert record["totals"]["copied"]["tensors"] == len(weights)
    assert record["totals"]["new"]["tensors"] == 0
    assert record["memory"][0]["source_cache"] == record["memory"][0]["state"]
    written = tiny.load_all(tmp_path / "out")
    assert {t.name: t.shape for t in plan.having("copied")} == {name: tuple(x.shape) for name, x in written.items()}


def test_pickled_weights(tmp_path):
    config = gsa.CONFIG | gsa.OF_2024
    weights = gsa.weights(config)
    folder = gsa.write(tmp_path / "source", config, gsa.as_in_2024(weights))
    convert(folder, tmp_path / "expected")
    convert(pickled(folder, files=2), tmp_path / "out")
    expected, actual = tiny.load_all(tmp_path / "expected"), tiny.load_all(tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], x) for name, x in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "source"]


def test_from_the_hub(tmp_path, monkeypatch):
    folder, _, _ = source(tmp_path, shards=2)
    cache = tmp_path / "cache"

    def download(name, allow_patterns):
        shutil.copytree(folder, cache, dirs_exist_ok=True, ignore=lambda _, files: unwanted(files, allow_patterns))
        return str(cache)

    def unwanted(files, patterns):
        return [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)]

    def metadata(name):
        shards = {}
        for tensor, header in read_headers(folder).items():
            shards.setdefault(header.shard, SimpleNamespace(tensors={})).tensors[tensor] = header
        return SimpleNamespace(files_metadata=shards)

    monkeypatch.setattr("t2r_conversion.source.snapshot_download", download)
    monkeypatch.setattr("t2r_conversion.source.get_safetensors_metadata", metadata)
    plan = convert("fla-hub/gsa", tmp_path / "hub", dry_run=True)
    assert plan.source.kind == "hub"
    assert not list(cache.glob("*.safetensors"))
    convert("fla-hub/gsa", tmp_path / "hub")
    convert(folder, tmp_path / "out")
    assert tiny.hashes(tmp_path / "hub") == tiny.hashes(tmp_path / "out")
    assert {t.name for t in plan.having("copied")} == set(tiny.load_all(tmp_path / "hub"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"feature_map": "relu"}, ["feature_map 'relu'", "feature_map 'swish'"]),
        ({"use_output_gate": True, "use_short_conv": True}, ["use_output_gate True, use_short_conv True"]),
        ({"use_norm": False}, ["use_norm False", "has use_norm True"]),
        ({"elementwise_affine": False}, ["elementwise_affine False"]),
        ({"expand_k": 0.5}, ["expand_k 0.5", "expand_k 1"]),
        ({"exapnd_v": 2}, ["exapnd_v 2"]),
        ({"use_rope": True}, ["use_rope True"]),
        ({"clamp_min": -3.0}, ["clamp_min -3.0"]),
        ({"attnres_block_size": 2}, ["attnres_block_size 2"]),
        ({"hidden_act": "powlu"}, ["hidden_act 'powlu'"]),
        ({"num_heads": 5}, ["hidden_size 32", "num_heads 5"]),
        ({"num_heads": 0}, ["num_heads is 0"]),
        ({"hidden_size": None}, ["hidden_size is None"]),
        ({"norm_eps": "small"}, ["norm_eps is 'small'"]),
        ({"gate_logit_normalizer": 0}, ["gate_logit_normalizer is 0"]),
        ({"attn": SOFTMAX | {"num_heads": 2}}, ["attn: num_heads 2", "4"]),
        ({"attn": SOFTMAX | {"num_kv_heads": None}}, ["attn: num_kv_heads 4", "2"]),
        ({"attn": SOFTMAX | {"qkv_bias": True}}, ["attn: qkv_bias True"]),
        ({"attn": SOFTMAX | {"layers": [1, 3]}}, ["attn: no layers 3"]),
        ({"attn": [SOFTMAX, SOFTMAX | {"layers": [2], "window_size": 4}]}, ["attn: window_size None and 4"]),
        ({"attn": SOFTMAX | {"window_size": 0}}, ["window_size is 0"]),
        ({"attn": 3}, ["config.json"]),
    ],
)
def test_options_that_the_paper_start_is_not(tmp_path, changes, needles):
    folder = gsa.write(tmp_path / "source", gsa.CONFIG | changes, gsa.weights(gsa.CONFIG))
    with pytest.raises(ValueError) as caught:
        convert(folder, tmp_path / "out")
    for needle in ["config.json", *needles]:
        assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_are_not_known(tmp_path):
    config, weights = gsa.CONFIG, gsa.weights(gsa.CONFIG)
    more = weights | {"model.layers.0.attn.g_proj.weight": torch.ones(32, 32)}
    del more["model.layers.1.attn.g_norm.weight"]
    with pytest.raises(ValueError, match=r"missing: model.layers.1.self_attn.g_norm.weight; 1 unexpected: .*g_proj"):
        convert(gsa.write(tmp_path / "odd", config, more), tmp_path / "out")
    twice = weights | {"model.layers.0.attn.norm.weight": torch.ones(32)}
    with pytest.raises(ValueError, match=r"several tensors .*layers.0.attn.norm.weight.*layers.0.attn_norm.weight"):
        convert(gsa.write(tmp_path / "twice", config, twice), tmp_path / "out")
    wide = gsa.as_in_2024(weights)
    wide["model.layers.2.mlp.gate_proj.weight"] = torch.ones(95, 32)
    with pytest.raises(ValueError, match=r"wrong shape: model.layers.2.mlp.gate_proj.weight \[47, 32\]"):
        convert(gsa.write(tmp_path / "wide", config | gsa.OF_2024, wide), tmp_path / "out")


def test_buffers_of_rotary_positions_are_left_out(tmp_path):
    folder, config, weights = source(tmp_path, attn=SOFTMAX)
    tiny.add_tensors(folder / "model.safetensors", model__layers__1__attn__rotary__inv_freq=torch.ones(4))
    convert(folder, tmp_path / "out")
    assert error(logits(tmp_path / "out"), gsa.logits(config, weights, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "window"}, "has Gated Slot Attention already, of start 'paper' with 6 slots; leave out start"),
        ({"num_slots": 64, "keep_softmax": [0]}, "leave out num_slots, keep_softmax"),
        ({"calibrate": "text.txt"}, "calibrate has no effect with start 'paper'"),
        ({"source_format": "gguf"}, "'gguf' is unknown; use 'fla'"),
    ],
)
def test_options_that_would_change_the_source(tmp_path, options, message):
    folder, _, _ = source(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out", **options)
    convert(folder, tmp_path / "out", start="paper", num_slots=6)


def test_a_source_that_is_not_from_there(tmp_path):
    llama = tiny.llama(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama: a llama model, none of flash-linear-attention"):
        convert(llama, tmp_path / "out", source_format="fla")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "window"}, "start 'window' has no counterpart .* rotates .* hides unwritten slots, .* schedule"),
        ({"start": "routed"}, "start 'routed' has no counterpart .* routers"),
        ({"attention_bias": True, "qk_norm": True}, "attention_bias True, qk_norm True cannot be had"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {
                "layer_types": ["full_attention", "sliding_attention", "linear_attention"],
                "sliding_window": 4,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            "several kinds of softmax attention, rope_type 'linear'",
        ),
    ],
)
def test_models_that_cannot_go_there(tmp_path, changes, message):
    T2RForCausalLM(T2RConfig(**{**tiny.SHAPE, "num_slots": 8, "start": "paper"} | changes)).save_pretrained(
        tmp_path / "m"
    )
    with pytest.raises(ValueError, match=message) as caught:
        export_fla(tmp_path / "m", tmp_path / "out")
    assert "config.json" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_exported(tmp_path):
    llama = tiny.llama(tmp_path / "llama")
    with pytest.raises(ValueError, match="model_type 'llama'; only T2R models"):
        export_fla(llama, tmp_path / "out")
    with pytest.raises(ValueError, match=r"config.json: no such file; give the folder of a T2R model"):
        export_fla(tmp_path / "nothing", tmp_path / "out")
    folder, _, _ = source(tmp_path)
    convert(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="exists already"):
        export_fla(tmp_path / "ours", folder)
    tiny.add_tensors(next((tmp_path / "ours").glob("*.safetensors")), extra=torch.ones(1))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = next(iter(index["weight_map"].values()))
    (tmp_path / "ours" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="1 unexpected: extra"):
        export_fla(tmp_path / "ours", tmp_path / "out")


def test_reading_headers_is_enough_to_plan(tmp_path):
    folder, _, _ = source(tmp_path)
    read = read_source(folder)
    assert plan_conversion(read).config.output_norm_eps == 1e-5
