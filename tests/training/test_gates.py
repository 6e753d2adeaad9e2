"""What is measured of gates and of work, against the definitions."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t2r.model import T2RConfig, T2RForCausalLM
from t2r.training.adapters import add_adapters
from t2r.training.config import LoraConfig, LossConfig, StageConfig
from t2r.training.flops import flops_per_token, matrix_parameters, peak_flops
from t2r.training.gates import gate_statistics, watched_gates
from t2r.training.predict import predicted_loss
from t2r.training.teachers import OwnTeacher
from tests.model.tiny import shake, student, tokens
from tests.model.tiny import teacher as tiny_teacher


def slots_of(model):
    return [sum(model.config.slots_of(i)) for i in model.config.slot_layers]


def figures(model, T=64):
    with torch.no_grad(), watched_gates(model) as found:
        model(tokens(1, T), use_cache=False)
    return gate_statistics(torch.stack(found), slots_of(model))


def test_a_window_keeps_for_as_long_as_it_is_wide():
    model = student(tiny_teacher(), gate_write_logit=30.0, gate_keep_logit=30.0)
    found, slots = figures(model), model.config.num_slots
    assert found["memory"] == pytest.approx(slots, rel=1e-3)  # one slot is written a token
    assert found["mean"] == pytest.approx(1 - 1 / slots, rel=1e-3)
    assert found["saturated"] == 1
    soft = figures(student(tiny_teacher(), gate_write_logit=2.0, gate_keep_logit=2.0))
    assert soft["saturated"] == 0
    assert soft["memory"] < slots


def test_each_layer_keeps_for_as_long_as_its_own_slots_last():
    gates = {"gate_write_logit": 30.0, "gate_keep_logit": 30.0}
    found = figures(student(tiny_teacher(), slots_by_layer=[8, [30, 10], 14], **gates))
    assert found["memory_by_layer"] == pytest.approx([8, 20, 14], rel=1e-3)
    assert found["memory"] == pytest.approx(14, rel=1e-3)


@pytest.mark.parametrize("last", ["linear_attention", "hybrid_sliding"])
def test_adapters_and_kept_layers_do_not_matter(last):
    kinds = ["linear_attention", "full_attention", last]
    model = student(tiny_teacher(), layer_types=kinds, hybrid_window=5)
    shake(model)
    plain = figures(model)
    assert len(plain["memory_by_layer"]) == 2
    assert figures(add_adapters(model, LoraConfig(r=2))) == plain
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_the_teacher_that_passes_by_does_not_count():
    model = add_adapters(student(tiny_teacher()), LoraConfig(r=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    x, found = tokens(1, 64), []
    for weights in (LossConfig(), LossConfig(distill=0.0, cross_entropy=1.0)):
        with watched_gates(model) as of_pass:
            predicted_loss(model, model, OwnTeacher(), {"input_ids": x}, x, weights)
        found.append(gate_statistics(torch.stack(of_pass), slots_of(model)))
    assert found[0] == found[1]
    assert len(found[0]["memory_by_layer"]) == 3


def test_work_is_what_the_forward_pass_multiplies():
    network = T2RConfig(
        hidden_size=512, intermediate_size=1536, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=512, num_hidden_layers=3, num_slots=8, num_sinks=2,
    )  # fmt: skip
    model, T = T2RForCausalLM(network), 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long), use_cache=False)
    assert counter.get_total_flops() == pytest.approx(2 * T * sum(matrix_parameters(network)), rel=0.05)
    forward = 2 * sum(matrix_parameters(network))
    finetune = StageConfig(loss=LossConfig(distill=0.0, cross_entropy=1.0))
    assert flops_per_token(network, finetune) == 2 * forward
    assert flops_per_token(network, StageConfig()) == 3 * forward  # and the teacher's
    assert flops_per_token(network, StageConfig(trains="full")) == 4 * forward
    align = StageConfig(stage="align", loss=LossConfig(align=1.0, distill=0.0))
    attention, mlp, _ = matrix_parameters(network)
    assert flops_per_token(network, align) == 2 * (3 * attention + mlp)
    assert peak_flops(torch.device("cpu")) is None
