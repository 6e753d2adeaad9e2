"""Heads get slots by what slots forget."""

import itertools
import json

import pytest
import torch

from t2r.model import T2RConfig, T2RForCausalLM
from t2r_conversion import calibrate, convert, routers, slots
from t2r_conversion.slots import allotted, by_layer, can_differ, levels
from tests.conversion import tiny
from tests.tiny import tiny_llama, tiny_text

CPU = torch.device("cpu")


def config_of(layers, **options):
    return T2RConfig(**tiny.SHAPE | {"num_hidden_layers": layers, "start": "routed", "num_slots": 32} | options)


def needs_of(weights, config):
    """Needs that fall with the number of slots, of heads."""
    return {head: [weight * slots**-1.5 for slots in levels(config)] for head, weight in weights.items()}


def test_what_is_needed_falls_nearly_to_the_least_that_there_is():
    """Beside all ways to share out as many slots."""
    config = config_of(3)
    weights = [1.0, 9.0, 0.1, 3.0, 1.5, 0.5]
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    needs = needs_of(dict(zip(heads, weights, strict=True)), config)
    found, choices = allotted(needs, config), levels(config)
    assert choices == [16, 32, 64, 128]

    def cost(each):
        return sum(needs[head][choices.index(slots)] for head, slots in zip(heads, each, strict=True))

    best = min((each for each in itertools.product(choices, repeat=6) if sum(each) <= 6 * 32), key=cost)
    mine = [found[head] for head in heads]
    assert sum(mine) <= 6 * 32
    assert cost(best) <= cost(mine) < 1.02 * cost(best)
    assert cost(mine) < 0.9 * cost([32] * 6)
    assert found[0, 1] == max(mine)


def test_heads_that_need_more_come_first():
    config = config_of(5)
    heads = [(layer, head) for layer in range(5) for head in range(2)]
    found = allotted(needs_of({head: 40.0**i for i, head in enumerate(heads)}, config), config)
    assert list(found.values()) == sorted(found.values())
    assert found[0, 0] == 16
    assert found[4, 1] == 128


def test_kept_layers_have_no_part_in_it():
    config = config_of(4, layer_types=["linear_attention", "full_attention"] + ["linear_attention"] * 2)
    weights = {(0, 0): 1.0, (0, 1): 1.0, (2, 0): 50.0, (2, 1): 1.0, (3, 0): 1.0, (3, 1): 1.0}
    found = allotted(needs_of(weights, config), config)
    assert sum(found.values()) <= 6 * 32
    assert found[2, 0] == 64
    assert by_layer(found, config) == [16, 32, [64, 32], 32]


def test_layers_whose_heads_are_alike_have_one_number():
    config = config_of(2)
    assert by_layer({(0, 0): 64, (0, 1): 16, (1, 0): 32, (1, 1): 32}, config) == [[64, 16], 32]


def test_heads_get_half_as_many_to_four_times():
    assert levels(config_of(2, num_slots=64)) == [32, 64, 128, 256]
    assert levels(config_of(2, num_slots=11)) == [6, 11, 22, 44]
    assert levels(config_of(2, num_slots=256)) == [128, 256, 512]  # of a window of 1,024 tokens
    assert can_differ(config_of(2, num_slots=64))


def test_sinks_are_left_slots_beside_them():
    assert levels(config_of(2, num_slots=16, num_sinks=12)) == [16, 32, 64]
    assert not can_differ(config_of(2, num_slots=16, num_sinks=12))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(calibrate, "WINDOW", 96)
    for name, value in {"LATER": 5, "FAR": 30, "ENDING": 9, "QUERIES": 1}.items():
        monkeypatch.setattr(routers, name, value)


def test_needs_are_what_slots_change_in_the_residual_stream(tmp_path, short):
    """Beside the first layer of a model with so many slots in one head, whose routers were fitted to the same text."""
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(500))
    options = {"gate_write": 30.0, "gate_keep": 30.0, "calibrate": tmp_path / "text.txt", "calibration_tokens": 192}
    windows = calibrate.calibration_of(tmp_path / "text.txt", 192, 16, tmp_path / "source").windows
    weights = tiny.load_all(tmp_path / "source")
    config = config_of(2, num_slots=16, num_sinks=2, vocab_size=22, head_dim=8)
    measured = slots._needs(config, weights.__getitem__, windows, CPU, None)
    whole = len(windows[0])  # slots for all tokens
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(routers, "SPREADS", (1.0,))
        patch.setattr("t2r_conversion.calibration_of", lambda *a: calibrate.Calibration("text", windows))
        for head, (count, found) in itertools.product(range(2), [(8, 0), (16, 1), (32, 2)]):
            each = [whole, whole]
            each[head] = count
            convert(tmp_path / "source", tmp_path / "out", num_sinks=2, slots_by_layer=[each, 16], overwrite=True,
                    **options)  # fmt: skip
            model, outputs = T2RForCausalLM.from_pretrained(tmp_path / "out"), []
            model.model.layers[0].self_attn.register_forward_hook(lambda *a, to=outputs: to.append(a[-1][:, 16:]))
            model(windows, use_cache=False)
            with model.softmax_attention():
                model(windows, use_cache=False)
            before = model.model.embed_tokens(windows)[:, 16:]
            change = (outputs[0] - outputs[1]).square().sum(-1) / before.square().sum(-1) ** slots.POWER
            assert measured[0, head][found] == pytest.approx(change.mean().item(), rel=1e-3)


def test_converted_by_need(tmp_path, short, monkeypatch):
    tiny_llama(tmp_path / "source", num_hidden_layers=5)
    (tmp_path / "text.txt").write_text(tiny_text(500))
    monkeypatch.setattr(
        slots, "_needs", lambda *a: needs_of(dict.fromkeys(heads, 1.0) | {(1, 0): 40.0}, config_of(5, num_slots=16))
    )
    heads = [(layer, head) for layer in range(5) for head in range(2)]
    done = []
    command = {"num_slots": 16, "num_sinks": 2, "calibrate": tmp_path / "text.txt", "calibration_tokens": 192}
    plan = convert(tmp_path / "source", tmp_path / "out", calibrating=lambda *at: done.append(at), **command)
    assert plan.config.slots_by_layer == [8, [32, 16], 16, 16, 16]
    assert plan.config.num_slots == 16
    assert done == [(n, 10) for n in range(6, 11)]  # the first pass is another function here
    model = T2RForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.self_attn.f_proj.out_features for layer in model.model.layers] == [16, 48, 32, 32, 32]
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["slots_by_layer"] == [8, [32, 16], 16, 16, 16]
    assert len(record["calibration"]["errors"]) == 5
    convert(tmp_path / "source", tmp_path / "even", slots_by_layer="even", **command)
    assert T2RConfig.from_pretrained(tmp_path / "even").slots_by_layer is None
    assert model.config.state_elements() == T2RConfig.from_pretrained(tmp_path / "even").state_elements()


def test_where_heads_cannot_differ_they_do_not(tmp_path, short):
    one = ["linear_attention", "full_attention", "full_attention"]
    assert can_differ(config_of(3, layer_types=one))
    assert not can_differ(config_of(3, layer_types=one, num_key_value_heads=1))
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(500))
    done, command = [], {"num_slots": 16, "num_sinks": 12, "calibrate": tmp_path / "text.txt"}
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
