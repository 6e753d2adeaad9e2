"""Alignment, against the definition with everything held at once."""

import pytest
import torch

from t2r.model import SLOT_ATTENTION
from t2r.training.adapters import add_adapters, select_trained
from t2r.training.align import alignment_loss
from t2r.training.config import LoraConfig, LossConfig, StageConfig
from t2r.training.teachers import OwnTeacher
from tests.model.tiny import shake, student, tokens
from tests.model.tiny import teacher as tiny_teacher

OWN = OwnTeacher()
ALIGN = StageConfig(stage="align", loss=LossConfig(align=1.0, distill=0.0))


def model_to_align(trains="lora", **overrides):
    model = add_adapters(student(tiny_teacher(), **overrides), LoraConfig(r=2))
    select_trained(model, StageConfig(stage="align", trains=trains, loss=ALIGN.loss))
    shake(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def directly(model, x, counted):
    """The same from the layers' recorded inputs and outputs, by plain autograd, one layer after another."""
    base, seen = model.get_base_model(), {}
    layers = [layer.self_attn for layer in base.model.layers if layer.self_attn.kind in SLOT_ATTENTION]
    hooks = [
        layer.register_forward_hook(lambda m, a, k, o: seen.__setitem__(m, (a, k, o)), with_kwargs=True)
        for layer in layers
    ]
    with OWN.active(model):
        base(x, use_cache=False)
    for hook in hooks:
        hook.remove()
    sums = []
    for layer in layers:
        arguments, keywords, expected = seen[layer]
        actual = layer(*arguments, **keywords)
        sums.append((((actual - expected) ** 2).sum(-1) / (expected**2).sum(-1))[counted].sum())
    return torch.stack(sums)


MIXED = ["linear_attention", "full_attention", "linear_attention"]
HYBRID = ["linear_attention", "full_attention", "hybrid_sliding"]


@pytest.mark.parametrize("options", [{}, {"layer_types": MIXED}, {"layer_types": HYBRID, "hybrid_window": 5}])
def test_it_is_the_relative_error_of_each_layer(options):
    model, x = model_to_align(**options), tokens(2, 40)
    counted = torch.rand(2, 40) > 0.3
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = directly(model, x, counted)
    loss, by_layer = alignment_loss(model, OWN, {"input_ids": x}, counted)
    assert torch.allclose(by_layer, expected, rtol=1e-4)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    gradients = torch.autograd.grad(2 * loss, trained)
    for a, b in zip(gradients, torch.autograd.grad(2 * expected.mean(), trained), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        assert b.abs().sum() > 0


def test_packed_documents_are_aligned_as_alone():
    model, x = model_to_align(), tokens(1, 50)
    counted = torch.ones(1, 50, dtype=torch.bool)
    _, packed = alignment_loss(model, OWN, {"input_ids": x, "cu_seqlens": torch.tensor([0, 13, 50])}, counted)
    alone = sum(
        alignment_loss(model, OWN, {"input_ids": part}, counted[:, : part.shape[1]])[1] for part in x.split([13, 37], 1)
    )
    assert torch.allclose(packed, alone, rtol=1e-4)


@pytest.mark.parametrize(("trains", "kinds"), [("lora", {"lora_", "f_proj"}), ("gates", {"f_proj"})])
def test_what_trains(trains, kinds):
    model = model_to_align(trains)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {kind for name in before for kind in ("lora_", "f_proj") if kind in name} == kinds
    assert all(".self_attn." in name for name in before)
    loss, _ = alignment_loss(model, OWN, {"input_ids": tokens(1, 20)}, torch.ones(1, 20, dtype=torch.bool))
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert {name for name, p in model.named_parameters() if p.grad is not None} == before
    assert not any(layer.self_attn._forward_hooks for layer in model.get_base_model().model.layers)


def test_a_window_that_holds_everything_is_aligned_already():
    model = add_adapters(student(tiny_teacher(), gate_write_logit=30.0, gate_keep_logit=30.0), LoraConfig(r=2))
    slots = model.config.num_slots
    _, by_layer = alignment_loss(
        model, OwnTeacher(), {"input_ids": tokens(1, slots)}, torch.ones(1, slots, dtype=torch.bool)
    )
    assert by_layer.max() < 1e-6
    longer = torch.ones(1, 3 * slots, dtype=torch.bool)
    assert alignment_loss(model, OWN, {"input_ids": tokens(1, 3 * slots)}, longer)[1].min() > 1e-3
