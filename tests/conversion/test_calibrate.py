"""Routers are fitted to the attention that tokens receive."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from t2r.model import T2RForCausalLM
from t2r.model.positions import Positions
from t2r_conversion import calibrate, convert, routers
from t2r_conversion.calibrate import calibration_of
from t2r_conversion.routers import distortion, fit_routers, ridge
from t2r_conversion.stream import Stream, lifetimes
from tests.conversion import tiny
from tests.tiny import tiny_llama, tiny_text


@pytest.fixture
def short(monkeypatch):
    """Windows that a tiny text fills."""
    monkeypatch.setattr(calibrate, "WINDOW", 64)
    for name, value in {"LATER": 5, "FAR": 30, "ENDING": 9, "QUERIES": 1}.items():
        monkeypatch.setattr(routers, name, value)


def importance(probabilities):
    """Of each token, from attention `[heads, L, L]` of one group, as it is defined."""
    L = probabilities.shape[1]
    rows = [[probabilities[:, i, t].square().sum().item() for i in range(t + 5, min(t + 30, L))] for t in range(L)]
    return torch.tensor([(sum(row) / max(1, len(row))) ** 0.5 for row in rows])


@pytest.mark.parametrize("make", tiny.FAMILIES)
def test_streamed_layers_see_what_the_whole_model_sees(make, tmp_path, short, monkeypatch):
    """Inputs and importance of each layer where slots hold all, beside those of transformers with eager attention."""
    window = {"sliding_window": 20} if make is tiny.mistral else {}
    source = make(tmp_path / "source", **window)
    convert(source, tmp_path / "out", start="window", num_slots=8)
    model = T2RForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    windows = torch.randint(0, 96, (2, 64), generator=torch.Generator().manual_seed(0))
    inputs, attention = [], []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, a, k: inputs.append(a[0]), with_kwargs=True)
    interface = calibrate_eager(attention)
    monkeypatch.setattr("t2r.model.modeling_t2r.eager_attention_forward", interface)
    with torch.no_grad(), model.softmax_attention():
        model(windows, use_cache=False)
    seen = []
    monkeypatch.setattr(routers, "ridge", lambda x, y: seen.append((x, y)) or (torch.zeros(2, 32), torch.zeros(2), 0.0))
    config = model.config
    config.start, config.num_sinks, config.num_slots = "routed", 1, 64
    fit_routers(config, tiny.load_all(tmp_path / "out").__getitem__, windows, torch.device("cpu"))
    counted = slice(1, 64 - 9)
    for (x, y), given, probabilities in zip(seen, inputs, attention, strict=True):
        assert torch.allclose(x, given[:, counted].flatten(0, 1), atol=1e-3, rtol=1e-3)
        for b in range(2):
            for head in range(2):
                expected = importance(probabilities[b, 2 * head : 2 * head + 2])[counted].clamp_min(1e-9).log()
                assert torch.allclose(y.view(2, -1, 2)[b, :, head], expected, atol=1e-2)


@pytest.mark.parametrize("slots_by_layer", ["even", [11, 14, 20], [[20, 11], 14, 20]])
def test_layers_are_fitted_to_what_the_converted_model_sees(tmp_path, short, monkeypatch, slots_by_layer):
    tiny_llama(tmp_path / "source", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(tiny_text(400))
    seen, ridge_itself = [], routers.ridge
    monkeypatch.setattr(routers, "ridge", lambda x, y: seen.append(x) or ridge_itself(x, y))
    options = {"num_slots": 14, "num_sinks": 2, "gate_write": 30.0, "gate_keep": 30.0, "calibration_tokens": 128}
    options |= {"keep_softmax": [1], "slots_by_layer": slots_by_layer}
    convert(tmp_path / "source", tmp_path / "out", calibrate=tmp_path / "text.txt", **options)
    model, given = T2RForCausalLM.from_pretrained(tmp_path / "out"), []
    for i in (0, 2):
        attention = model.model.layers[i].self_attn
        attention.register_forward_pre_hook(lambda _, a, __: given.append(a[0]), with_kwargs=True)
    windows = calibration_of(tmp_path / "text.txt", 128, 14, tmp_path / "source").windows
    with torch.no_grad():
        model(windows, use_cache=False)
    assert len(seen) == 2
    for x, expected in zip(seen, given, strict=True):
        assert torch.allclose(x, expected[:, 2 : 64 - 9].flatten(0, 1), atol=1e-4)


def calibrate_eager(kept):
    """Transformers' eager attention, which also keeps its probabilities."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attend(*args, **kwargs):
        output, probabilities = eager_attention_forward(*args, **kwargs)
        kept.append(probabilities)
        return output, probabilities

    return attend


def test_ridge_finds_a_linear_law():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    law = torch.tensor([[1.0, -0.2, 5.0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    weight, bias, fit = ridge(x, x @ law.T + 7 + 0.1 * torch.randn(4000, 2, generator=generator))
    assert torch.allclose(weight, law, rtol=0.05, atol=0.05)
    assert (x @ weight.T + bias).mean(0).abs().max() < 1e-4
    assert 0.9 < fit < 1


def test_a_token_lives_until_its_slot_is_taken():
    slots = torch.tensor([[0, 1, 0, 2, 1, 0], [0, 0, 1, 1, 1, 2]], dtype=torch.int32).T  # [L, H]
    assert lifetimes(slots).T.tolist() == [[2, 4, 5, 6, 6, 6], [1, 6, 3, 4, 6, 6]]


def test_distortion_is_that_of_the_layer(tmp_path, short):
    """Beside the layer itself, with gates that write and keep fully."""
    source = tmp_path / "source"
    tiny_llama(source)
    options = {"start": "routed", "slots_by_layer": [[24, 12], 12], "num_sinks": 2}
    (tmp_path / "text.txt").write_text(tiny_text(400))
    convert(source, tmp_path / "out", calibrate=tmp_path / "text.txt", gate_write=30.0, gate_keep=30.0, **options)
    model = T2RForCausalLM.from_pretrained(tmp_path / "out")
    layer, config = model.model.layers[0].self_attn, model.config
    x = torch.randn(1, 64, config.hidden_size, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(1, 64, dtype=torch.long)
    positions = Positions.resolve(x, None, None, None, 0)
    rope, outputs, kept = model.model.rotary_emb(x, positions.ids), [], []
    layer.o_proj.register_forward_hook(lambda _, arguments, __: outputs.append(arguments[0]))
    with torch.no_grad():
        layer(x, positions=positions, slots=None, rope=rope, attention_mask=None, past_key_values=None)
        heads = list(Stream(config, model.state_dict().__getitem__, tokens, x.device).heads(layer, x[0]))
        taken = {group.heads: slots[0] for group, _, slots, _ in layer.schedule(x, positions, None)}
        ends = lifetimes(torch.cat([taken[0,], taken[1,]], -1))[None, None]
        actual = distortion([iter(heads)], torch.cat([torch.full_like(ends, 64), ends]), [24, 12])  # [ways, H]
    for head, (weights, v) in enumerate(heads):
        first = [24, 12][head]
        expected = (weights @ v)[:, first:]  # [G, Q, D]
        mine = outputs[0][0, first:].unflatten(-1, (config.num_attention_heads, -1)).transpose(0, 1)
        mine = mine.unflatten(0, (config.num_key_value_heads, -1))[head]
        kept.append((mine - expected).square().sum() / expected.square().sum())
    assert actual[0].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert actual[1].tolist() == pytest.approx([x.item() for x in kept], rel=1e-3)
    assert actual[1].min() > 1e-4


def test_converted_with_routers(tmp_path, short):
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(400))
    done = []
    options = {"start": "routed", "num_slots": 12, "num_sinks": 2, "keep_softmax": [0]}
    convert(
        tmp_path / "source", tmp_path / "out", calibrate=tmp_path / "text.txt", calibration_tokens=200,
        calibrating=lambda layers, total: done.append((layers, total)), **options,
    )  # fmt: skip
    assert done == [(n, 4) for n in range(1, 5)]  # slots by need, routers
    model = T2RForCausalLM.from_pretrained(tmp_path / "out")
    router = model.model.layers[1].self_attn.router
    assert router.weight.abs().min() > 0
    assert not hasattr(model.model.layers[0].self_attn, "router")
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["calibration"]["text"] == "text.txt"
    assert record["calibration"]["tokens"] == 192
    for figures in (record["calibration"]["r_squared"], record["calibration"]["errors"]):
        assert len(figures) == 1
        assert math.isfinite(figures[0])


def test_each_head_takes_the_spread_that_distorts_least(tmp_path, short, monkeypatch):
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(400))
    chosen, weights = [], []
    monkeypatch.setattr(routers, "distortion", lambda *a: chosen.append(distortion(*a)) or chosen[-1])
    monkeypatch.setattr(routers, "ridge", lambda *a: weights.append(ridge(*a)) or weights[-1])
    options = {"num_slots": 14, "num_sinks": 2, "calibrate": tmp_path / "text.txt", "calibration_tokens": 400}
    convert(tmp_path / "source", tmp_path / "out", keep_softmax=[1], **options)
    router = T2RForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].self_attn.router
    factors = torch.tensor(routers.SPREADS)[chosen[0].argmin(0)]
    assert torch.allclose(router.weight, weights[0][0] * factors[:, None])
    assert torch.allclose(router.bias, weights[0][1] * factors)
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["calibration"]["errors"][0] == pytest.approx(chosen[0].min(0).values.mean().item(), abs=1e-4)


def test_without_a_text_routers_are_fitted_to_what_python_ships(tmp_path, short):
    tiny_llama(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", num_slots=8, num_sinks=2, calibration_tokens=256)
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["start"] == "routed"
    assert record["calibration"]["text"] == "the reference that Python ships"
    assert record["calibration"]["tokens"] == 256


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": "b"}', r"text\.jsonl, line 2: no `text` to calibrate on"),
        ('{"text": null}', "line 2: no `text`"),
        ('"a string"', "line 2: no `text`"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_file_without_text_is_told(tmp_path, short, line, message):
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out", calibrate=tmp_path / "text.jsonl", num_slots=8, num_sinks=2)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_text_that_is_not_utf8_is_told(tmp_path, short, name):
    tiny_llama(tmp_path / "source")
    (tmp_path / name).write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8"):
        convert(tmp_path / "source", tmp_path / "out", calibrate=tmp_path / name, num_slots=8, num_sinks=2)


def test_windows_are_longer_than_what_slots_hold(tmp_path, short):
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(400))
    for slots, length in ((32, 64), (40, 80)):
        assert calibration_of(tmp_path / "text.txt", 160, slots, tmp_path / "source").windows.shape[1] == length


def test_a_source_without_a_tokenizer_is_told(tmp_path, short):
    source = tiny.llama(tmp_path / "source")
    with pytest.raises(ValueError, match=r"no tokenizer that works.*use start 'window'"):
        convert(source, tmp_path / "out", num_slots=8)
    assert not (tmp_path / "out").exists()


def test_no_window_spans_two_documents(tmp_path, short):
    tokenizer = tiny_llama(tmp_path / "source") and AutoTokenizer.from_pretrained(tmp_path / "source")
    texts = [tiny_text(count, seed=count) for count in (150, 10, 64, 300)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    windows = calibration_of(tmp_path / "text.jsonl", 64 * 5 + 30, 8, tmp_path / "source").windows
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = [ids[0][:64], ids[0][64:128], ids[2], ids[3][:64], ids[3][64:128]]
    assert windows.tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "window", "calibrate": "text.txt"}, "no effect with start 'window'"),
        ({"start": "routed", "calibrate": "nowhere.txt"}, "no such file to calibrate on"),
        ({"start": "routed", "calibrate": "text.txt"}, "none of 1024 tokens"),
    ],
)
def test_bad_calibration(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text(tiny_text(40))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out", **{"num_slots": 8, "num_sinks": 1} | options)
    assert not (tmp_path / "out").exists()
