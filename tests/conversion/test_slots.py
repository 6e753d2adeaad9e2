"""Layers get slots by what slots forget."""

import itertools
import json

import pytest
import torch

from t2r.model import T2RConfig, T2RForCausalLM
from t2r_conversion import calibrate, convert, routers, slots
from t2r_conversion.slots import FACTORS, STEP, allotted, can_differ
from t2r_kernels import MAX_SLOTS
from tests.conversion import tiny
from tests.tiny import tiny_llama, tiny_text

CPU = torch.device("cpu")


def config_of(layers, **options):
    return T2RConfig(**tiny.SHAPE | {"num_hidden_layers": layers, "start": "routed", "num_slots": 32} | options)


def needs_of(weights, power=1.5):
    """Needs that fall as a power of the number of slots."""
    return {layer: [weight * factor**-power for factor in FACTORS] for layer, weight in weights.items()}


def test_what_is_needed_falls_to_the_least_that_there_is():
    """Beside all ways to share out as many slots."""
    weights = {0: 1.0, 1: 9.0, 2: 0.1, 3: 3.0}
    config = config_of(4, num_slots=32)
    found = allotted(needs_of(weights), config)
    choices = range(16, 65, STEP)

    def cost(each):
        return sum(weights[i] * (count / 32) ** -1.5 for i, count in enumerate(each))

    best = min((each for each in itertools.product(choices, repeat=4) if sum(each) <= 128), key=cost)
    assert sum(found) <= 128
    assert cost(found) == pytest.approx(cost(best), rel=1e-6)
    assert found[1] > found[3] > found[2]


def test_layers_alike_are_given_alike():
    assert allotted(needs_of(dict.fromkeys(range(6), 1.0)), config_of(6)) == [32] * 6


def test_kept_layers_have_no_part_in_it():
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    found = allotted(needs_of({0: 1.0, 2: 50.0}), config_of(3, layer_types=kinds))
    assert found == [16, 32, 48]


@pytest.mark.parametrize(("num_slots", "most"), [(48, 96), (64, 128), (96, MAX_SLOTS), (128, MAX_SLOTS), (160, 320)])
def test_no_layer_gets_more_than_twice_as_many_or_than_the_kernels_take(num_slots, most):
    found = allotted(needs_of({0: 1e6, 1: 1.0, 2: 1.0, 3: 1.0}), config_of(4, num_slots=num_slots))
    assert most - STEP < max(found) <= most
    assert sum(found) <= 4 * num_slots


def test_sinks_are_left_slots_beside_them():
    found = allotted(needs_of({0: 1e6, 1: 1.0}), config_of(2, num_slots=16, num_sinks=12))
    assert min(found) > 12


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(calibrate, "WINDOW", 96)
    for name, value in {"LATER": 5, "FAR": 30, "ENDING": 9, "QUERIES": 1}.items():
        monkeypatch.setattr(routers, name, value)


def test_needs_are_what_slots_change_in_the_residual_stream(tmp_path, short):
    """Beside the first layer of a model with so many slots, whose routers were fitted to the same text."""
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(500))
    options = {"gate_write": 30.0, "gate_keep": 30.0, "calibrate": tmp_path / "text.txt", "calibration_tokens": 192}
    windows = calibrate.calibration_of(tmp_path / "text.txt", 192, 16, tmp_path / "source").windows
    weights = tiny.load_all(tmp_path / "source")
    config = config_of(2, num_slots=16, num_sinks=2, vocab_size=22, head_dim=8)
    measured = slots._needs(config, weights.__getitem__, windows, CPU, None)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(routers, "SPREADS", (1.0,))
        for factor, found in zip(FACTORS, measured[0], strict=True):
            convert(tmp_path / "source", tmp_path / "out", num_slots=round(16 * factor), num_sinks=2,
                    slots_by_layer="even", overwrite=True, **options)  # fmt: skip
            model, outputs = T2RForCausalLM.from_pretrained(tmp_path / "out"), []
            model.model.layers[0].self_attn.register_forward_hook(lambda *a, to=outputs: to.append(a[-1][:, 16:]))
            model(windows, use_cache=False)
            with model.softmax_attention():
                model(windows, use_cache=False)
            before = model.model.embed_tokens(windows)[:, 16:]
            change = (outputs[0] - outputs[1]).square().sum(-1) / before.square().sum(-1) ** slots.POWER
            assert found == pytest.approx(change.mean().item(), rel=1e-3)


def test_converted_by_need(tmp_path, short, monkeypatch):
    tiny_llama(tmp_path / "source", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(tiny_text(500))
    monkeypatch.setattr(slots, "_needs", lambda *a: needs_of({0: 1.0, 1: 40.0, 2: 1.0}))
    done = []
    command = {"num_slots": 16, "num_sinks": 2, "calibrate": tmp_path / "text.txt", "calibration_tokens": 192}
    plan = convert(tmp_path / "source", tmp_path / "out", calibrating=lambda *at: done.append(at), **command)
    assert plan.config.slots_by_layer == [8, 32, 8]
    assert plan.config.num_slots == 16
    assert done == [(4, 6), (5, 6), (6, 6)]  # the first pass is another function here
    model = T2RForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.self_attn.num_slots for layer in model.model.layers] == [8, 32, 8]
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["slots_by_layer"] == [8, 32, 8]
    assert len(record["calibration"]["errors"]) == 3
    convert(tmp_path / "source", tmp_path / "even", slots_by_layer="even", **command)
    assert T2RConfig.from_pretrained(tmp_path / "even").slots_by_layer is None
    assert model.config.state_elements() == T2RConfig.from_pretrained(tmp_path / "even").state_elements()


def test_few_slots_are_not_divided(tmp_path, short):
    assert not can_differ(config_of(3, num_slots=15))
    assert not can_differ(config_of(3, layer_types=["linear_attention", "full_attention", "full_attention"]))
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(500))
    done, command = [], {"num_slots": 15, "num_sinks": 2, "calibrate": tmp_path / "text.txt"}
    plan = convert(tmp_path / "source", tmp_path / "out", calibrating=lambda *at: done.append(at), **command)
    assert plan.config.slots_by_layer is None
    assert done == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_by_layer": "some"}, "slots_by_layer 'some' is unknown; use 'by need', 'even'"),
        ({"slots_by_layer": "by need", "start": "window"}, "slots_by_layer: by need has no effect with start 'window'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    tiny_llama(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out", **options)
