"""Runs over sharded weights (FSDP2 through accelerate), by two processes on the CPU."""

import sys

import pytest
import yaml
from safetensors.torch import load_file

from t2r.training import merge, run
from tests.training.tiny import run_on_two_processes, workspace

STAGES = [
    {"stage": "align", "steps": 2},
    {"stage": "distill", "steps": 3},
    {"stage": "finetune", "steps": 2, "trains": "gates"},
]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    path = workspace(tmp_path)
    evaluated = {"text": str(tmp_path / "heldout.txt"), "window": 48, "limit": 5, "every": 4}
    content = {"stages": STAGES, "eval": evaluated, "gradient_accumulation": 2, "save_every": 1}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | content))
    return path


def assert_alike(actual, expected, losses=1e-4):
    assert len(actual["history"]) == len(expected["history"])
    for a, b in zip(actual["history"], expected["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=losses)
        assert a.get("alignment", []) == pytest.approx(b.get("alignment", []), rel=losses)
    for when in ("before", "after"):
        assert actual["evaluation"][when]["student"] == pytest.approx(expected["evaluation"][when]["student"], rel=1e-3)
        assert actual["evaluation"][when]["teacher"] == pytest.approx(expected["evaluation"][when]["teacher"], rel=1e-3)
    for a, b in zip(actual["evaluation"]["during"], expected["evaluation"]["during"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_sharded_is_one_process_and_resumed_is_uninterrupted(config, tmp_path):
    alone = run(config, ["gradient_accumulation=4", f"output={tmp_path / 'alone'}"])
    sharded = run_on_two_processes(config, sharded=True)
    assert (tmp_path / "run" / "3-finetune" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()
    assert_alike(sharded, alone)
    expected, actual = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "run"))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():  # Adam's steps are as large where a gradient is next to nothing
        assert (actual[name] - value).norm() <= 2e-2 * value.norm(), name
    merge(tmp_path / "run", tmp_path / "merged")

    killed = f"output={tmp_path / 'killed'}"
    run_on_two_processes(config, killed, sharded=True, dies_after=12)  # two passes a step: in the stage of gates alone
    assert (tmp_path / "killed" / "3-finetune" / "checkpoint-1" / "optimizer.bin").is_file()
    with pytest.raises(ValueError, match="saved with sharded weights"):
        run(config, [killed], resume=True)
    assert_alike(run_on_two_processes(config, killed, sharded=True, resume=True), sharded, losses=1e-6)


def test_everything_trains_sharded(config, tmp_path):
    stages = "stages=[{stage: align, steps: 1}, {stage: distill, steps: 2}]"
    options = ["trains=full", "optim.lr=1e-3", "optim.gate_lr=1e-3", "eval.every=2", stages]
    alone = run(config, ["gradient_accumulation=4", f"output={tmp_path / 'alone'}", *options])
    assert_alike(run_on_two_processes(config, *options, sharded=True), alone)
    merge(tmp_path / "run", tmp_path / "merged")


def test_a_run_on_two_processes_goes_on_by_one(config, tmp_path):
    alone = run(config, ["gradient_accumulation=4", f"output={tmp_path / 'alone'}"])
    run_on_two_processes(config, dies_after=8)
    assert (tmp_path / "run" / "2-distill" / "checkpoint-1" / "optimizer.pt").is_file()
    resumed = run(config, ["gradient_accumulation=4"], resume=True)
    assert_alike(resumed, alone)


def test_other_steps_than_before_are_told(config, tmp_path, monkeypatch):
    run(config, ["stages=[{stage: distill, steps: 2}]"])
    (tmp_path / "run" / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=r"steps of 128 tokens, and these have 64"):
        run(config, ["stages=[{stage: distill, steps: 4}]", "gradient_accumulation=1"], resume=True)
