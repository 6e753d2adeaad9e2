"""What a run would take, beside what it takes."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import t2r.training.plan
from t2r.cli.main import app
from t2r.model import T2RConfig, T2RForCausalLM
from t2r.training import load_config, plan_run, run
from t2r.training.adapters import add_adapters, let_routers_train, select_trained
from t2r.training.config import DataConfig, LoraConfig, OptimConfig, StageConfig, TrainConfig
from t2r.training.plan import saved_bytes
from tests.training.tiny import workspace


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path)


def test_the_plan_counts_what_the_run_trains(config):
    plan = plan_run(load_config(config))
    record = run(config)["training"]
    (stage,) = plan.as_dict()["stages"]
    assert stage["trained_parameters"] == record["trained_parameters"]
    assert (stage["steps"], stage["tokens"]) == (record["steps"], record["tokens"])


def test_gates_alone_are_fewer(config):
    both, gates = (plan_run(load_config(config, [f"trains={kind}"])).stages[0] for kind in ("lora", "gates"))
    assert gates.trained_parameters < both.trained_parameters
    assert gates.memory["trained"] < both.memory["trained"]


def saved_for_backward(model, x):
    """Bytes of all that autograd keeps after a forward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(input_ids=x, skip_logits=True, use_cache=False).hidden_states[0]
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def kept_by_a_layer(kind, routers=False, **more):
    """Bytes a token that a layer keeps, measured; and the model's configuration."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}

    def kept(layers):
        kinds = ["linear_attention", *[kind] * (layers - 1)]
        options = {"num_hidden_layers": layers, "layer_types": kinds, "hybrid_window": 32} | more
        network = T2RConfig(**sizes, **options, head_dim=32, vocab_size=64)
        model, stage = T2RForCausalLM(network), StageConfig(optim=OptimConfig(router_lr=float(routers)))
        let_routers_train(model, [stage])
        model = add_adapters(model, LoraConfig(r=2))
        select_trained(model, stage)
        return saved_for_backward(model, torch.zeros(1, 256, dtype=torch.long)), network

    (few, _), (many, network) = kept(2), kept(4)
    return (many - few) / 2 / 256, network


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_what_a_layer_keeps_for_the_backward_pass(kind):
    measured, network = kept_by_a_layer(kind)
    if kind == "linear_attention":
        assert measured > 0.8 * saved_bytes(network, 3, 4)  # the chunked operator on the CPU keeps more of its own
    else:
        assert saved_bytes(network, 3, 4) == pytest.approx(measured, rel=0.2)


def test_what_a_window_keeps_beside_the_slots():
    (with_window, network), (without, _) = map(kept_by_a_layer, ("hybrid_sliding", "linear_attention"))
    expected = saved_bytes(network, 3, 4) - saved_bytes(network, 0, 4)
    assert expected == pytest.approx(with_window - without, rel=0.2)


def test_what_routers_that_train_keep():
    (learning, network), (fitted, _) = (kept_by_a_layer("linear_attention", x, start="routed") for x in (True, False))
    expected = saved_bytes(network, 3, 4, routers=True) - saved_bytes(network, 3, 4)
    assert expected == pytest.approx(learning - fitted, rel=0.2)


def test_command(config, tmp_path):
    words = ["train", str(config), "--dry-run", "data.files=[nowhere.txt]"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "1-distill" in shown.output
    assert "nowhere.txt" in shown.output
    content = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert content["missing_files"] == ["nowhere.txt"]
    assert content["stages"][0]["memory_bytes"] == sum(content["stages"][0]["memory"].values())
    assert not (tmp_path / "run").exists()
    refused = CliRunner().invoke(app, ["train", str(config), "--json"])
    assert refused.exit_code == 2
    assert "--json goes with --dry-run" in refused.output


def test_a_model_that_is_not_converted(config, tmp_path):
    from tests.model.tiny import teacher

    teacher().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="a llama model; convert it first"):
        plan_run(load_config(config, [f"model={tmp_path / 'plain'}"]))


@pytest.mark.parametrize(
    ("row", "column", "stage", "settings"),
    [
        ("finetune_peak_gib", "ours", "finetune", {}),
        ("finetune_peak_gib", "ours_plain", "finetune", {}),
        ("distill_peak_gib", "ours", "distill", {}),
        ("distill_peak_gib", "ours_plain", "distill", {}),
        ("align_peak_gib", "ours", "align", {}),
        ("two_gpus_peak_gib", "ours", "finetune", {"processes": 2, "sharded": True}),
    ],
)
def test_the_estimate_is_near_what_was_measured(row, column, stage, settings, tmp_path, monkeypatch):
    """A model of Mistral-7B's shape on an H200; see benchmarks/training.py."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "training.json"
    measured = next(x for x in json.loads(results.read_text())["rows"] if x["name"] == row)[column] * 2**30
    monkeypatch.setattr(t2r.training.plan, "wants_liger", lambda *_: column == "ours")
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_slots": 64}
    T2RConfig(**shape | heads).save_pretrained(tmp_path / "model")
    config = TrainConfig(
        model=str(tmp_path / "model"), output="run", batch_size=8, gradient_checkpointing=True,
        data=DataConfig(files=["none.txt"], sequence_length=2048), stages=[{"stage": stage, "steps": 8}],
    )  # fmt: skip
    (plan,) = plan_run(config, on_cuda=True, **settings).stages
    assert sum(plan.memory.values()) == pytest.approx(measured, rel=0.2)


def test_a_quantised_teacher_is_smaller(config):
    whole, eight, four = (
        plan_run(load_config(config, ["trains=full", *bits])).stages[0].memory["frozen weights"]
        for bits in ([], ["teacher_bits=8"], ["teacher_bits=4"])
    )
    assert four < eight < whole
