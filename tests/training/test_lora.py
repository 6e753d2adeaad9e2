"""LoRA in one piece is PEFT's."""

import peft
import pytest
import torch
from torch import nn

from t2r.training import merge, run
from t2r.training.adapters import add_adapters
from t2r.training.config import LoraConfig
from t2r.training.lora import fuse_lora
from tests.model.tiny import student
from tests.training.tiny import workspace


def pair(dropout=0.0, bias=False, **options):
    """A model with PEFT's own layers, and one like it with ours."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Tanh(), nn.Linear(20, 8, bias=bias))
        lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], lora_dropout=dropout, **options)
        model = peft.get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        models.append(model)
    fuse_lora(models[1])
    return models


def is_fused(model):
    return "forward" in vars(model.base_model.model[0])


def step(model, x, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return {"y": y, "x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
def test_outputs_and_gradients(shape, dtype, bias):
    plain, fused = pair(bias=bias)
    assert is_fused(fused)
    x = torch.randn(*shape, 12)
    expected, actual = step(plain, x, dtype), step(fused, x, dtype)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (actual[name] - value).float().norm() <= tolerance * value.float().norm(), name


def test_without_adapters_it_is_the_base():
    plain, fused = pair()
    x = torch.randn(4, 12)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(x), plain(x))
    assert not torch.equal(fused(x), fused.base_model.model[0].base_layer(x)[:, :8])


def test_merged():
    plain, fused = pair()
    x = torch.randn(4, 12)
    fused.merge_adapter()
    assert torch.allclose(fused(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "bias": True}])
def test_what_is_not_plain_stays_pefts(options):
    assert not is_fused(pair(**options)[1])


def test_a_frozen_input_needs_no_gradient():
    _, fused = pair()
    fused(torch.randn(4, 12)).sum().backward()
    assert all(p.grad is not None for p in fused.parameters() if p.requires_grad)


def test_other_kinds_of_adapters_come_with_peft(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    record = run(workspace(tmp_path), ["lora.options={use_dora: true}", "steps=2", "save_every=10"])
    assert len(record["history"]) == 2
    merge(tmp_path / "run", tmp_path / "merged")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dorra": True}, "use_dorra"), ({"r": 3}, "r cannot be set here"), ({"lora_alpha": 3}, "lora_alpha cannot")],
)
def test_options_that_peft_does_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(student(), LoraConfig(options=options))


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("bias", "lora_only"), ("bias", "all")],
)
def test_options_that_would_change_the_teacher_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"lora.options.{name}: {value} changes what is the teacher too; choose from"):
        add_adapters(student(), LoraConfig(options={name: value}))
    add_adapters(student(), LoraConfig(options={"init_lora_weights": "gaussian", "use_rslora": True}))
