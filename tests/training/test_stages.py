"""Runs of several stages."""

import os
import shutil
import signal

import pytest
import yaml

import t2r.training.trainer
from t2r.training import merge, run
from t2r.training.stages import plan_stages
from t2r.training.watch import Terminated
from tests.training.tiny import run_on_two_processes, tiny_config, workspace

STAGES = [
    {"stage": "align", "steps": 3, "trains": "gates"},
    {"stage": "distill", "tokens": 200, "sequence_length": 16},  # 4 steps of 2 * 2 * 16 tokens
    {"stage": "finetune", "steps": 5, "batch_size": 1},
]
TRAINER = t2r.training.trainer.T2RTrainer


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    path = workspace(tmp_path)
    content = yaml.safe_load(path.read_text()) | {"stages": STAGES, "gradient_accumulation": 2}
    path.write_text(yaml.safe_dump(content | {"lora": {"r": 4, "dropout": 0.1}}))
    return path


def history(record):
    return [(e["stage"], e["step"], e["loss"], e.get("alignment")) for e in record["history"]]


def dies(after, how):
    """`training_step` that ends otherwise after so many calls."""
    calls, step = [], TRAINER.training_step

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            how()
        return step(self, *args, **kwargs)

    return training_step


def interrupt():
    raise KeyboardInterrupt


def test_a_plan(config, tmp_path):
    stages = plan_stages(tiny_config(tmp_path), processes=3)
    assert [(s.name, s.tokens_per_step, s.steps, s.steps_before) for s in stages] == [
        ("1-align", 3 * 128, 3, 0),
        ("2-distill", 3 * 64, 2, 3),
        ("3-finetune", 3 * 64, 5, 5),
    ]


def test_a_stage_of_nothing_but_warm_up_is_told(config, tmp_path):
    recipe = tiny_config(tmp_path)
    recipe.optim.warmup_steps = 2
    with pytest.warns(UserWarning, match="2-distill has 2 steps, all of them warm-up"):
        plan_stages(recipe, processes=3)


@pytest.mark.parametrize("after", [4, 6, 8, 13, 20])  # within each stage, and right behind a boundary (6 | 8 | 10)
def test_resumed_is_uninterrupted_bit_for_bit(config, tmp_path, monkeypatch, after):
    whole = run(config, [f"output={tmp_path / 'whole'}"])
    assert [(e["stage"], e["step"]) for e in whole["history"]] == [
        *(("1-align", i) for i in (1, 2, 3)),
        *(("2-distill", i) for i in (4, 5, 6, 7)),
        *(("3-finetune", i) for i in (8, 9, 10, 11, 12)),
    ]
    monkeypatch.setattr(TRAINER, "training_step", dies(after, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    resumed = run(config, resume=True)
    assert history(resumed) == history(whole)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_each_stage_does_its_own(config, tmp_path):
    record = run(config, ["stages.0.steps=12", "optim.gate_lr=3e-2"])
    alignment = [e["alignment"] for e in record["history"] if "alignment" in e]
    assert len(alignment) == 12
    assert len(alignment[0]) == 3  # layers
    assert sum(map(sum, alignment[-3:])) < sum(map(sum, alignment[:3]))
    stages = record["training"]["stages"]
    assert [(s["stage"], s["steps"], s["objective"].get("cross_entropy")) for s in stages] == [
        ("1-align", 12, None),
        ("2-distill", 4, None),
        ("3-finetune", 5, 1.0),
    ]
    assert record["training"]["steps"] == 21
    assert record["training"]["tokens"] == 12 * 128 + 4 * 64 + 5 * 64
    left = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").glob("*/*"))
    assert left == ["1-align/checkpoint-12", "2-distill/checkpoint-4", "3-finetune/checkpoint-5"]
    gates = [e["gates"] for e in record["history"] if "gates" in e]
    assert len(gates) == 9
    assert all(g["memory"] > 0 and 0 <= g["saturated"] <= 1 for g in gates)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Forget gates" in report
    assert "| 1-align | 12 | 1,536 |" in report
    merge(tmp_path / "run", tmp_path / "merged")


def test_alignment_leaves_adapters_alone_when_gates_alone_train(config, tmp_path):
    run(config, ["stages=[{stage: align, trains: gates, steps: 2}]"])
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all((t == 0).all() for name, t in tensors.items() if "lora_B" in name)
    assert any((t != 0).any() for name, t in tensors.items() if "f_proj.weight" in name)


def test_sigterm_saves_and_stops(config, tmp_path, monkeypatch):
    whole = run(config, [f"output={tmp_path / 'whole'}"])
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TRAINER, "training_step", dies(9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Terminated) as stopped:
        run(config, ["save_every=100"])
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    assert (tmp_path / "run" / "2-distill" / "checkpoint-2").is_dir()  # the step at hand was taken to its end
    assert history(run(config, ["save_every=100"], resume=True)) == history(whole)


def test_sigterm_behind_the_last_step_of_a_stage_is_not_lost(config, tmp_path, monkeypatch):
    save = TRAINER._save_checkpoint

    def asked_while_saving(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TRAINER, "_save_checkpoint", asked_while_saving)
    handler = signal.signal(signal.SIGTERM, lambda *_: interrupt())
    try:
        with pytest.raises(KeyboardInterrupt):
            run(config)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / "run" / "1-align" / "checkpoint-3").is_dir()
    assert not (tmp_path / "run" / "2-distill").exists()


def test_two_processes_are_one_with_their_batches(config, tmp_path):
    options = ["lora.dropout=0", "stages.2.batch_size=2", "stages.1.tokens=512", "stages.2.steps=3"]
    alone = run(config, ["gradient_accumulation=4", f"output={tmp_path / 'alone'}", *options])
    together = run_on_two_processes(config, *options)
    assert together["training"]["tokens"] == alone["training"]["tokens"]
    for a, b in zip(together["history"], alone["history"], strict=True):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_a_changed_stage_is_said(config, tmp_path, capsys):
    run(config)
    shutil.rmtree(tmp_path / "run" / "3-finetune")
    (tmp_path / "run" / "adapter_config.json").unlink()
    run(config, ["stages.2.steps=6"], resume=True)
    assert "resuming with changes to the run's configuration: stages" in " ".join(capsys.readouterr().err.split())


def test_evaluation_along_the_way(config, tmp_path, monkeypatch):
    options = [f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2", "eval.every=4"]
    plain = run(config, [*options[:3], f"output={tmp_path / 'plain'}"])
    whole = run(config, [*options, f"output={tmp_path / 'whole'}"])
    assert history(whole) == history(plain)  # it changes nothing
    during = whole["evaluation"]["during"]
    assert [entry["step"] for entry in during] == [4, 8, 12]
    assert during[-1]["student"] == whole["evaluation"]["after"]["student"]
    assert f"| 8 | {during[1]['student']:.2f} |" in (tmp_path / "whole" / "report.md").read_text()
    monkeypatch.setattr(TRAINER, "training_step", dies(18, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config, options)
    monkeypatch.undo()
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    assert run(config, options, resume=True)["evaluation"] == whole["evaluation"]
