"""A separate teacher in 8 or 4 bits."""

import math

import pytest
import torch
import torch.nn.functional as F

import t2r.training.teachers
from t2r.evaluation import load_model
from t2r.training import load_config, plan_run, run
from t2r.training.teachers import SeparateTeacher
from tests.model.tiny import student, teacher, tokens
from tests.training.tiny import workspace

# On CPUs bitsandbytes quantises to 4 bits only what divides into its blocks: 64 numbers of the input, 32 of the output.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    path = workspace(tmp_path)
    student(teacher(**SHAPE), **SHAPE).save_pretrained(tmp_path / "model")
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trains=full", "teacher_bits=5"], "teacher_bits must be 8 or 4, or unset, got 5"),
        (["trains=full", "teacher_bits=0"], "teacher_bits must be 8 or 4, or unset, got 0"),
        (["teacher_bits=8"], "teacher_bits has no effect: .* unless trains: full"),
        (["teacher_bits=4", "stages=[{stage: align, trains: gates}]"], "teacher_bits has no effect"),
    ],
)
def test_values_that_do_not_work(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config, overrides)


def test_bits_that_there_are_not(config, tmp_path):
    with pytest.raises(ValueError, match="bits must be 8 or 4, or None, got 2"):
        load_model(tmp_path / "model", bits=2)


def test_without_bitsandbytes_nothing_begins(config, tmp_path, monkeypatch):
    monkeypatch.setattr(t2r.training.teachers, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"teacher_bits: 4 needs bitsandbytes; install it \(pip install"):
        run(config, ["trains=full", "teacher_bits=4"])
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_plan_says_it(config):
    plan = plan_run(load_config(config, ["trains=full", "teacher_bits=4"]))
    assert plan.teacher.startswith("a second copy of the model in 4 bits, frozen, with softmax attention")


def predictions(model, x):
    with SeparateTeacher(model).active(None) as base:
        return base(x.to(base.device)).logits.float().log_softmax(-1).cpu()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "divergence"), [(8, 0.002), (4, 0.06)])
def test_a_quantised_teacher_is_close_to_itself(config, tmp_path, device, dtype, bits, divergence):
    pytest.importorskip("bitsandbytes")
    whole, quantised = (load_model(tmp_path / "model", dtype=dtype, device=device, bits=n) for n in (None, bits))
    for name, weight in quantised.named_parameters():
        kept = weight.dtype.is_floating_point
        assert kept == ("_proj" not in name or "f_proj" in name), name
        assert not kept or torch.equal(weight, whole.get_parameter(name)), name
    x = tokens(2, 40)
    expected, actual = (predictions(model, x) for model in (whole, quantised))
    other = predictions(student(teacher(seed=1, **SHAPE), **SHAPE), x)
    close, far = (F.kl_div(log_q, expected, reduction="sum", log_target=True) / x.numel() for log_q in (actual, other))
    assert 0 < close < divergence
    assert far > 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_everything_trains_beside_a_quantised_teacher(config, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    stages = "stages=[{stage: align, trains: gates, steps: 2}, {stage: distill, steps: 4, optim: {lr: 1e-3}}]"
    options = ["trains=full", stages, f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2"]
    whole = run(config, [*options, f"output={tmp_path / 'whole'}"])
    quantised = run(config, [*options, f"teacher_bits={bits}"])
    assert f"second copy of the model in {bits} bits" in quantised["training"]["teacher"]
    assert "bits" not in whole["training"]["teacher"]
    expected, actual = (record["evaluation"]["before"]["teacher"] for record in (whole, quantised))
    assert actual == pytest.approx(expected, rel=0.1)
    assert actual != pytest.approx(expected, rel=1e-6)
    assert len(quantised["history"]) == 6
    assert all(math.isfinite(entry["loss"]) for entry in quantised["history"])
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path / "run", dtype="own").parameters())
