"""Decoding as a CUDA graph is decoding without."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from t2r.model import T2RCache, graphs, modeling_t2r
from tests.model.tiny import shake, student, teacher, tokens

MODELS = {
    "window": {},
    "routed": {"start": "routed"},
    "hybrid": {"hybrid_window": 6, "start": "routed"},
    "heads differ": {"start": "routed", "slots_by_layer": [8, [20, 12], 16]},
}
OPTIONS = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def replayed(self, step, cache):
    """In place of a capture, on a CPU: what was captured runs when it is replayed, on the same tensors."""
    self.output = torch.empty_like(self.inputs[0])
    layout = [layer.groups for layer in cache.layers]

    def replay():
        left, lengths = iter(self.state), [layer.cumulative_length for layer in cache.layers]
        for layer, groups in zip(cache.layers, layout, strict=True):
            layer.groups = [slots.each(lambda _: next(left)) for slots in groups]
        held = [layer.groups for layer in cache.layers]
        self.output.copy_(step(*self.inputs))
        graphs._copy_changed(self.state, cache.tensors())
        for layer, groups, length in zip(cache.layers, held, lengths, strict=True):
            layer.groups, layer.cumulative_length = groups, length

    self.captured = SimpleNamespace(replay=replay)


@pytest.fixture(params=["as on a GPU", pytest.param("on a GPU", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "on a GPU":
        return "cuda"

    def takes(head_dim, cache, hidden_states, options):
        step = cache is not None and hidden_states.shape[1] == 1 and bool(cache.layers[0].groups)
        return step and not any(options.values())

    monkeypatch.setattr(graphs.StepGraph, "_capture", replayed)
    monkeypatch.setattr(modeling_t2r, "takes_graph", takes)
    return "cpu"


@pytest.fixture(params=MODELS)
def model(request, device):
    return shake(student(**MODELS[request.param])).to(device)


def without(model, function):
    """What a function returns where there are no graphs."""
    model.model.cuda_graphs = False
    try:
        return function()
    finally:
        model.model.cuda_graphs = True


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation(model, options):
    x = tokens(2, 10).to(model.device)
    mask = torch.ones_like(x)
    mask[0, :4] = 0

    def generate():
        return model.generate(x, attention_mask=mask, max_new_tokens=12, **OPTIONS, **options)

    assert torch.equal(generate(), without(model, generate))


@torch.no_grad()
def step_by_step(model, x, cache, positions=True):
    """Logits of each token by itself."""
    found = []
    for t in range(x.shape[1]):
        ids = torch.full((len(x), 1), cache.get_seq_length(), device=x.device) if positions else None
        found.append(model(x[:, t : t + 1], position_ids=ids, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@torch.no_grad()
def test_a_cache_is_taken_up_wherever_it_is_left(model):
    x = tokens(4, 60).to(model.device)

    def logits():
        cache, found = T2RCache(model.config), []
        found.append(model(x[:, :9], past_key_values=cache, use_cache=True).logits)
        found.append(step_by_step(model, x[:, 9:14], cache))
        found.append(model(x[:, 14:20], past_key_values=cache, use_cache=True).logits)  # more of a prompt
        found.append(step_by_step(model, x[:, 20:24], cache, positions=False))
        other = copy.deepcopy(cache)
        found.append(step_by_step(model, x[:, 30:34], other))
        found.append(step_by_step(model, x[:, 24:28], cache))
        assert cache.get_seq_length() == other.get_seq_length() == 28
        cache.reorder_cache(torch.tensor([1, 0, 3, 3], device=x.device))
        found.append(step_by_step(model, x[:, 28:32], cache))
        cache.batch_select_indices(torch.tensor([2, 1], device=x.device))
        found.append(step_by_step(model, x[:2, 32:40], cache))
        with torch.inference_mode():
            found.append(step_by_step(model, x[:2, 40:44], cache).clone())
        found.append(step_by_step(model, x[:2, 44:50], cache))
        cache.reset()
        found.append(model(x[:2, :9], past_key_values=cache, use_cache=True).logits)
        found.append(step_by_step(model, x[:2, 50:], cache))
        return found

    for ours, expected in zip(logits(), without(model, logits), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@torch.no_grad()
def test_steps_are_replayed(model, monkeypatch):
    calls, through = [], model.model._through_layers
    monkeypatch.setattr(model.model, "_through_layers", lambda *a, **k: calls.append(1) or through(*a, **k))
    cache = T2RCache(model.config)
    step_by_step(model, tokens(1, 3).to(model.device), cache)
    first = cache.graph
    step_by_step(model, tokens(1, 40).to(model.device), cache)
    assert cache.graph is first
    assert first.captured is not None
    if model.device.type == "cuda":
        assert len(calls) == 3  # into the empty cache, a first step, a capture


@torch.no_grad()
def test_what_steps_depend_on_is_looked_at(model):
    """Each change makes another graph, and what comes out is what comes out without."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    x, cache = tokens(2, 60).to(model.device), T2RCache(model.config)
    changes = {
        "nothing": lambda: None,
        "an adapter is off": lambda: wrapped.base_model.disable_adapter_layers(),
        "on": lambda: wrapped.base_model.enable_adapter_layers(),
        "merged": lambda: wrapped.merge_adapter(),
        "not merged": lambda: wrapped.unmerge_adapter(),
        "weights elsewhere": lambda: [p.set_(p.clone()) for p in model.parameters()],
        "nothing again": lambda: None,
    }
    model(x[:, :9], past_key_values=cache, use_cache=True)
    graph, start = None, 9
    for change, make in changes.items():
        make()
        part = x[:, start : start + 4]
        expected = without(model, lambda part=part: step_by_step(model, part, copy.deepcopy(cache)))
        torch.testing.assert_close(step_by_step(model, part, cache), expected, rtol=0, atol=0)
        assert (cache.graph is graph) == change.startswith("nothing a"), change
        assert cache.graph.captured is not None
        graph, start = cache.graph, start + 4


@torch.no_grad()
def test_another_model_on_a_cache_that_was_reset(model):
    other = shake(student(teacher(seed=5), **MODELS["window"] | model.config.to_diff_dict())).to(model.device)
    x, cache = tokens(1, 30).to(model.device), T2RCache(model.config)
    step_by_step(model, x, cache)
    cache.reset()
    assert cache.graph is None
    expected = without(other, lambda: step_by_step(other, x, T2RCache(model.config)))
    torch.testing.assert_close(step_by_step(other, x, cache), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("where", ["layer", "norm", "before"])
def test_who_looks_in_sees_every_step(model, where):
    seen, cache, x = [], T2RCache(model.config), tokens(1, 30).to(model.device)
    module = model.model.norm if where == "norm" else model.model.layers[1]
    register = module.register_forward_pre_hook if where == "before" else module.register_forward_hook
    step_by_step(model, x[:, :9], cache)
    hook = register(lambda *_: seen.append(1))
    step_by_step(model, x[:, 9:20], cache)
    assert len(seen) == 11
    hook.remove()
    states = model(x[:, :1], past_key_values=cache, use_cache=True, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    step_by_step(model, x[:, 20:], cache)  # the hooks that this leaves behind change nothing
    assert cache.graph.captured is not None


@torch.no_grad()
def test_hidden_states_that_the_configuration_asks_for(model):
    cache, x = T2RCache(model.config), tokens(1, 9).to(model.device)
    step_by_step(model, x, cache)
    model.config.output_hidden_states = True
    found = model(x[:, :1], past_key_values=cache, use_cache=True).hidden_states
    assert len(found) == model.config.num_hidden_layers + 1


@pytest.mark.gpu
@torch.no_grad()
def test_what_cannot_be_captured_is_decoded_all_the_same(monkeypatch):
    model = shake(student(start="routed")).cuda()
    x, stream = tokens(1, 20).cuda(), torch.cuda.current_stream()
    expected = without(model, lambda: step_by_step(model, x, T2RCache(model.config)))
    forward = modeling_t2r.T2RDecoderLayer.forward

    def waits(self, hidden_states, **kwargs):
        assert hidden_states.sum().item() is not None
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(modeling_t2r.T2RDecoderLayer, "forward", waits)
    torch.testing.assert_close(step_by_step(model, x, T2RCache(model.config)), expected, rtol=0, atol=0)
    assert not model.model.cuda_graphs
    assert torch.cuda.current_stream() == stream


@pytest.mark.gpu
@torch.no_grad()
def test_on_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    model = shake(student(start="routed")).to("cuda:1")
    x, cache = tokens(1, 20).to("cuda:1"), T2RCache(model.config)
    expected = without(model, lambda: step_by_step(model, x, T2RCache(model.config)))
    torch.testing.assert_close(step_by_step(model, x, cache), expected, rtol=0, atol=0)
    assert cache.graph is None


def test_weights_that_are_quantised_or_moved_as_they_are_wanted_go_without():
    model, inputs = student(), [torch.zeros(1)]
    assert graphs.StepGraph(model.model, inputs).goes
    model.model.layers[1]._hf_hook = object()
    assert not graphs.StepGraph(model.model, inputs).goes
    model = student()
    model.model.layers[1].mlp.register_buffer("quantised", torch.zeros(2, dtype=torch.int8))
    assert not graphs.StepGraph(model.model, inputs).goes
    model = student()
    model.model.norm.to("meta")
    assert not graphs.StepGraph(model.model, inputs).goes


@torch.no_grad()
def test_a_graph_stays_with_its_cache(model):
    cache = T2RCache(model.config)
    step_by_step(model, tokens(1, 5).to(model.device), cache)
    assert cache.graph.captured is not None
    assert copy.deepcopy(cache).graph is None
    assert pickle.loads(pickle.dumps(cache.graph)) is None


def test_no_graph_on_a_cpu():
    model = student()
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    with torch.no_grad():
        assert not graphs.takes_graph(8, cache, torch.zeros(1, 1, 48), {})
