import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from t2r_conversion import read_source, render
from tests.conversion.tiny import plan_conversion

from . import tiny


@pytest.fixture
def source(tmp_path):
    return read_source(tiny.mistral(tmp_path / "source", dtype=torch.bfloat16, sliding_window=4096))


def test_totals_and_memory_by_hand(source):
    plan = plan_conversion(source, num_slots=16, num_sinks=2, keep_softmax=[2])
    assert plan.config.layer_types == ["linear_attention", "linear_attention", "sliding_attention"]
    gates = 2 * 16  # key/value heads x slots, in two layers
    assert plan.totals()["new"] == {"tensors": 4, "parameters": 2 * gates * 33, "bytes": 2 * gates * 33 * 2}
    parameters = sum(tensor.numel() for tensor in tiny.load_all(source.folder).values())
    assert plan.totals()["copied"]["parameters"] == parameters
    assert plan.totals()["copied"]["bytes"] == 2 * parameters
    assert plan.totals()["dropped"] == {"tensors": 0, "parameters": 0, "bytes": 0}
    state = 2 * (2 * 16 * 2 * 8) * 4  # layers x (heads x slots x keys and values x width) x fp32
    token = 2 * 2 * 8 * 2  # heads x keys and values x width x bf16
    assert plan.memory() == [
        {"tokens": 2048, "state": state, "kept_cache": token * 2048, "source_cache": 3 * token * 2048},
        {"tokens": 32768, "state": state, "kept_cache": token * 4096, "source_cache": 3 * token * 4096},
    ]


def test_a_window_beside_the_slots(source):
    plan = plan_conversion(source, num_slots=16, window=6, keep_softmax=[2])
    assert plan.config.layer_types == ["hybrid_sliding", "hybrid_sliding", "sliding_attention"]
    without = plan_conversion(source, num_slots=16, keep_softmax=[2])
    assert plan.totals() == without.totals()
    token = 2 * 2 * ((2 * 8 + 16) * 2 + 4)  # layers x heads x (keys, values and logits x bf16, and a slot's number)
    assert plan.memory()[0]["state"] == without.memory()[0]["state"] + 6 * token
    assert (plan.summary()["window"], plan.summary()["keep_softmax"]) == (6, [2])
    assert "window" not in without.summary()
    text = StringIO()
    Console(file=text, width=120).print(render(plan))
    assert "16 slots beside a window of 6 tokens" in text.getvalue()


def test_layers_that_differ(source):
    plan, even = plan_conversion(source, slots_by_layer=[8, 32, 9]), plan_conversion(source, num_slots=16)
    assert (plan.config.num_slots, plan.config.fewest_slots, plan.config.most_slots) == (16, 8, 32)
    assert sum(plan.config.slots_of_heads) == 2 * 49
    assert plan.memory()[0]["state"] * 48 == even.memory()[0]["state"] * 49
    assert plan.summary()["slots_by_layer"] == [8, 32, 9]
    assert "slots_by_layer" not in even.summary()
    shapes = {tensor.name: tensor.shape for tensor in plan.having("new")}
    assert [shapes[f"model.layers.{i}.self_attn.f_proj.weight"][0] for i in range(3)] == [16, 64, 18]
    text = StringIO()
    Console(file=text, width=120).print(render(plan))
    assert "8 to 32 (mean 16.3) slots" in text.getvalue()
    kept = plan_conversion(source, slots_by_layer=[8, 32, 9], keep_softmax=[1]).config
    assert (sum(kept.slots_of_heads), kept.most_slots) == (2 * 17, 9)
    beside, same = (
        config.state_bytes(2) - 4 * config.state_elements()
        for config in (
            plan_conversion(source, slots_by_layer=[8, 32, 9], window=5).config,
            plan_conversion(source, num_slots=16, window=5).config,
        )
    )
    assert beside == same + 5 * 2 * 2  # tokens x heads x the logit of one slot more, in bf16


def test_heads_that_differ(source):
    plan, even = plan_conversion(source, slots_by_layer=[[8, 32], 20, [16, 20]]), plan_conversion(source, num_slots=16)
    assert (plan.config.num_slots, plan.config.fewest_slots, plan.config.most_slots) == (19, 8, 32)
    assert plan.config.head_groups(0) == [(8, (0,)), (32, (1,))]
    assert plan.config.head_groups(1) == [(20, (0, 1))]
    assert plan.memory()[0]["state"] * 96 == even.memory()[0]["state"] * (8 + 32 + 20 + 20 + 16 + 20)
    shapes = {tensor.name: tensor.shape for tensor in plan.having("new")}
    assert [shapes[f"model.layers.{i}.self_attn.f_proj.weight"][0] for i in range(3)] == [40, 40, 36]
    assert plan.config.slots_in_words == "8 to 32 (mean 19.3)"
    assert plan_conversion(source, slots_by_layer=[(8, 32), 20, (16, 20)]).config.slots_by_layer == [
        [8, 32],
        20,
        [16, 20],
    ]
    beside = plan_conversion(source, slots_by_layer=[[8, 32], 20, [16, 20]], window=5).config
    logits = beside.state_bytes(2) - 4 * beside.state_elements() - 5 * 6 * (2 * 2 * beside.head_dim + 4)
    assert logits == 5 * 2 * (40 + 40 + 36)


def test_plan_is_json_and_names_no_path(source):
    plan = plan_conversion(source, num_slots=8)
    content = json.loads(json.dumps(plan.as_dict()))
    assert len(content["tensors"]) == len(plan.tensors)
    assert content["source"] == "source"
    assert str(source.folder.parent) not in json.dumps(content)


def test_table_shows_the_totals(source):
    plan = plan_conversion(source, num_slots=8, keep_softmax=[1])
    text = StringIO()
    Console(file=text, width=120).print(render(plan))
    for total in plan.totals().values():
        assert f"{total['parameters']:,}" in text.getvalue()
    assert "0, 2" in text.getvalue()
    assert "32,768" in text.getvalue()


def test_settings_without_effect_warn(source):
    with pytest.warns(UserWarning, match="num_sinks"):
        plan_conversion(source, start="paper", num_sinks=2)


def test_gate_logits_reach_the_configuration(source):
    config = plan_conversion(source, gate_write=5.0, gate_keep=6.0).config
    assert (config.gate_write_logit, config.gate_keep_logit) == (5.0, 6.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 4, "num_sinks": 4}, "num_sinks"),
        ({"slots_by_layer": [[], 9, 9]}, "gives a layer slots for 0 heads"),
        ({"slots_by_layer": [None, 9, 9]}, "holds integers, or a list of them for a layer, got None"),
        ({"num_slots": 0, "start": "paper"}, "num_slots"),
        ({"start": "mamba"}, "start"),
        ({"window": 0}, "hybrid_window must be at least 1, got 0"),
        ({"window": 4, "start": "paper"}, "needs start 'window' or 'routed'"),
        ({"keep_softmax": [0, 3, -1]}, "no layers -1, 3; the model has 0 to 2"),
        ({"slots_by_layer": [16, 16]}, "slots_by_layer is of 2 layers, num_hidden_layers is 3"),
        ({"slots_by_layer": []}, "slots_by_layer is of 0 layers"),
    ],
)
def test_bad_options(source, options, message):
    with pytest.raises(ValueError, match=message):
        plan_conversion(source, **options)
