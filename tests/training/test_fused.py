"""Fused and compiled layers compute what the plain ones do."""

import sys

import pytest
import torch

import t2r.training.fused
from t2r.training import run
from t2r.training.adapters import add_adapters, base_of
from t2r.training.config import LoraConfig, LossConfig, TrainConfig
from t2r.training.fused import compile_layers, use_liger, wants_liger
from t2r.training.predict import predicted_loss
from t2r.training.teachers import OwnTeacher
from tests.model.tiny import shake, student, tokens
from tests.training.tiny import workspace


def adapted(**overrides):
    torch.manual_seed(0)
    return add_adapters(shake(student(**overrides)), LoraConfig(r=2))


def step(model, dtype=torch.float32):
    """Loss and gradients of packed documents."""
    device = next(model.parameters()).device
    rows = tokens(1, 50).to(device)
    inputs = {"input_ids": rows, "cu_seqlens": torch.tensor([0, 13, 50], device=device), "max_seqlen": 37}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = predicted_loss(model, model, OwnTeacher(), inputs, rows, LossConfig(cross_entropy=0.3))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance):
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_is_eager(checkpointing):
    plain, compiled = adapted(), adapted()
    if checkpointing:
        for model in (plain, compiled):
            model.train()
            base_of(model).gradient_checkpointing_enable()
            base_of(model).enable_input_require_grads()
    compile_layers(compiled, backend="aot_eager")
    assert_same(step(compiled), step(plain), 1e-5)


def test_a_run_with_compiled_layers_is_one_without(tmp_path, monkeypatch):
    """Gate statistics too, though compiled layers pass over hooks."""
    module = sys.modules["t2r.training.run"]  # the package's `run` is the function
    monkeypatch.setattr(module, "compile_layers", lambda model: compile_layers(model, backend="eager"))
    config = workspace(tmp_path)
    stages = "stages=[{stage: align, steps: 2}, {stage: distill, steps: 3}]"
    first = run(config, [stages, "log_every=2"])
    second = run(config, [stages, "log_every=2", "torch_compile=true", f"output={tmp_path / 'compiled'}"])
    for a, b in zip(first["history"], second["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b.get("gates") == pytest.approx(a.get("gates"))
    assert "gates" in second["history"][-1]


def test_liger_is_used_where_it_serves(monkeypatch):
    def wanted(installed, on_cuda, **settings):
        monkeypatch.setattr(t2r.training.fused, "find_spec", lambda _: object() if installed else None)
        return wants_liger(TrainConfig(**settings), on_cuda)

    assert wanted(True, True)
    assert not wanted(False, True)
    assert not wanted(True, False)
    assert not wanted(True, True, torch_compile=True)
    assert not wanted(True, True, use_liger_kernel=False)
    assert wanted(True, True, use_liger_kernel=True, torch_compile=True)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        wanted(False, True, use_liger_kernel=True)
    with pytest.raises(ValueError, match="needs a GPU"):
        wanted(True, False, use_liger_kernel=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_is_plain(dtype):
    pytest.importorskip("liger_kernel")
    plain, fused = adapted().cuda(), adapted().cuda()
    use_liger(fused)
    assert_same(step(fused, dtype), step(plain, dtype), 1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.gpu
def test_compiled_is_eager_on_a_gpu():
    plain, compiled = adapted().cuda(), adapted().cuda()
    compile_layers(compiled)
    assert_same(step(compiled), step(plain), 1e-3)
