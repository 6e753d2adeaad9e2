"""Configuration, saving and loading, initialisation, training mode."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from t2r.model import STARTS, T2RConfig, T2RForCausalLM, T2RModel, new_parameters
from t2r.model.starts import gate_of, window_schedule
from t2r_kernels import log_gate
from tests.model.tiny import SHAPE, shake, student, tokens


@pytest.mark.parametrize("options", [*({"start": start} for start in STARTS), {"hybrid_window": 5}])
def test_save_and_load(options, tmp_path):
    model, x = shake(student(**options)), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is T2RForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is T2RModel
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_import_t2r_is_enough(tmp_path):
    student().config.save_pretrained(tmp_path)
    program = (
        f"import t2r, transformers; print(type(transformers.AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "T2RConfig"


@pytest.mark.parametrize("start", STARTS)
def test_new_parameters_are_those_that_the_model_adds(start):
    config = T2RConfig(**SHAPE, start=start, layer_types=["linear_attention", "full_attention", "linear_attention"])
    torch.manual_seed(0)
    model = T2RForCausalLM(config)
    source = {
        name for name, _ in T2RForCausalLM(T2RConfig(**SHAPE, layer_types=["full_attention"] * 3)).named_parameters()
    }
    added = {name: p for name, p in model.named_parameters() if name not in source}
    expected = {
        f"model.layers.{i}.self_attn.{name}": spec for i in (0, 2) for name, spec in new_parameters(config).items()
    }
    assert {name: tuple(p.shape) for name, p in added.items()} == {name: spec[0] for name, spec in expected.items()}
    for name, p in added.items():
        _, mean, std = expected[name]
        assert p.mean().item() == pytest.approx(mean, abs=0.003)
        assert p.std().item() == pytest.approx(std, rel=0.05)


def test_missing_gates_are_initialised_on_loading(tmp_path):
    model = student(start="paper", layer_types=["full_attention"] * 3)
    model.save_pretrained(tmp_path)
    loaded = T2RForCausalLM.from_pretrained(tmp_path, layer_types=["linear_attention"] * 3)
    weight = loaded.model.layers[1].self_attn.f_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}, {"hybrid_window": 4}]
)
def test_gradient_checkpointing_changes_nothing(options):
    model, x = student(**options).train(), tokens(2, 20)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        gradients.append([loss.detach()] + [p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_skip_logits_gives_what_the_head_reads():
    model, x = student(), tokens(2, 9)
    out = model(x, skip_logits=True)
    assert out.logits is None
    assert torch.equal(model.lm_head(out.hidden_states[0]), model(x).logits)
    assert torch.equal(model(x, logits_to_keep=2).logits, model(x).logits[:, -2:])


def test_loss_honours_the_number_of_items():
    model, x = student(), tokens(2, 9)
    halved = model(x, labels=x, num_items_in_batch=32).loss.item()
    assert halved * 2 == pytest.approx(model(x, labels=x).loss.item())


def test_schedule_fills_the_sinks_once_and_then_goes_round():
    slots = window_schedule(torch.arange(12), num_slots=5, num_sinks=2)
    assert slots.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2]
    assert slots.dtype == torch.int32


def test_gates_at_the_start_write_one_slot_and_keep_the_rest():
    config = T2RConfig(**SHAPE, num_slots=5, num_sinks=2)
    gate = gate_of(window_schedule(torch.arange(6)[None], 5, 2)[..., None].expand(1, 6, 2), config)
    alpha = log_gate(torch.zeros(1, 6, 2, 5), gate).exp()[0, :, 0]
    written = alpha < 0.5
    assert written.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 2]
    assert alpha[written].max().item() == pytest.approx(torch.tensor(-config.gate_write_logit).sigmoid().item())
    assert (1 - alpha[~written]).max().item() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 4, "num_sinks": 4}, "num_sinks must be at least 0 and below num_slots"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"gate_write_logit": float("nan")}, "gate_write_logit must be a finite number"),
        ({"hidden_act": "nope"}, "'nope' is not an activation"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "rope_type 'nonsense'"),
        ({"start": "random"}, "'window', 'routed' or 'paper'"),
        ({"num_key_value_heads": 4}, "must be a multiple"),
        ({"layer_types": ["linear_attention"] * 2}, "names 2 layers"),
        ({"layer_types": ["conv"] * 3}, "conv not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        ({"layer_types": ["hybrid_sliding"] * 3}, "hybrid_window is not set"),
        ({"hybrid_window": 0}, "hybrid_window must be at least 1"),
        ({"slots_by_layer": [8, 8]}, "slots_by_layer is of 2 layers, num_hidden_layers is 3"),
        ({"slots_by_layer": [8, 4, 8]}, r"above num_sinks \(4\) in all layers, got 4 in one"),
        ({"slots_by_layer": [8, [8, 4], 8]}, r"above num_sinks \(4\) in all layers, got 4 in one"),
        ({"slots_by_layer": [8, (8, 9), 8]}, r"holds integers, or a list of them for a layer, got \(8, 9\)"),
        ({"slots_by_layer": [8, [8.5, 9], 8]}, "holds integers, or a list of them for a layer, got 8.5"),
        ({"slots_by_layer": [8, [8], 8]}, "gives a layer slots for 1 heads, num_key_value_heads is 2"),
        ({"slots_by_layer": [8, 8, 8], "start": "paper"}, "slots_by_layer needs start 'window' or 'routed'"),
        ({"hybrid_window": 4, "start": "paper"}, "needs start 'window' or 'routed'"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        T2RConfig(**SHAPE | change)


def test_a_resized_vocabulary_still_takes_losses():
    model, x = student(), tokens(1, 9)
    model.resize_token_embeddings(120)
    loss = model(x, loss_from_hidden=lambda head, hidden: (hidden @ head.weight.T).sum()).loss
    assert loss.item() == pytest.approx(model(x).logits.sum().item(), rel=1e-4)
    assert model(x).logits.shape == (1, 9, 120)
