"""The model against its teacher, and against itself computed in other ways."""

import pytest
import torch

from t2r.evaluation.generate import cache_bytes
from t2r.model import T2RCache
from t2r.model.positions import Positions
from t2r.model.routing import Router
from t2r.model.starts import slot_schedule
from tests.model.tiny import shake, sliding_teacher, student, teacher, tokens

LAYERS = {
    "all slots": None,
    "mixed": ["linear_attention", "full_attention", "linear_attention"],
    "all softmax": ["full_attention"] * 3,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


OPTIONS = {kind: {"layer_types": types} for kind, types in LAYERS.items()} | {
    "paper start": {"start": "paper"},
    "routed start": {"start": "routed"},
    "hybrid": {"hybrid_window": 7},
    "hybrid, one token": {"hybrid_window": 1, "layer_types": ["hybrid_sliding", "full_attention", "linear_attention"]},
    "hybrid, routed start": {"hybrid_window": 5, "start": "routed"},
    "layers differ": {"slots_by_layer": [8, 20, 16]},
    "heads differ, routed start": {"slots_by_layer": [[20, 8], 16, [8, 20]], "start": "routed"},
    "heads differ, hybrid, routed start": {
        "slots_by_layer": [[20, 8], 16, [8, 20]],
        "hybrid_window": 5,
        "start": "routed",
    },
    "heads differ, hybrid": {"slots_by_layer": [[20, 8], [8, 20], 16], "hybrid_window": 5},
    "layers differ, hybrid, routed start": {"slots_by_layer": [20, 8, 16], "hybrid_window": 5, "start": "routed"},
}


@pytest.fixture(params=OPTIONS)
def model(request):
    return shake(student(**OPTIONS[request.param]))


def close(a, b, tolerance=2e-4):
    assert (a - b).abs().max().item() <= tolerance


def masked_teacher(source, x, num_slots, num_sinks):
    """Softmax attention masked to the sinks and the last tokens that the ring holds."""
    mask = masked(x.shape[1], num_slots, num_sinks)[None, None].expand(len(x), 1, -1, -1)
    return source(x, attention_mask=mask).logits


def masked(T, num_slots, num_sinks):
    query, key = torch.arange(T)[:, None], torch.arange(T)
    seen = (key <= query) & ((key < num_sinks) | (key > query - (num_slots - num_sinks)))
    return torch.where(seen, 0.0, float("-inf"))


def test_exact_window_start_is_the_teacher_up_to_num_slots():
    source, x = teacher(), tokens(2, 16)
    close(student(source, exact=True)(x).logits, source(x).logits, 1e-4)


@pytest.mark.parametrize("start", ["window", "routed"])
def test_exact_start_of_layers_that_differ_is_the_teacher_up_to_the_fewest_slots(start):
    source, x = teacher(), tokens(2, 40)
    model = student(source, exact=True, start=start, slots_by_layer=[20, 12, [32, 16]])
    assert model.config.fewest_slots == 12
    close(model(x[:, :12]).logits, source(x[:, :12]).logits, 1e-4)
    assert (model(x[:, :13]).logits - source(x[:, :13]).logits)[:, 12].abs().max() > 1e-3


def test_heads_that_differ_are_masked_softmax_each():
    source, x = teacher(), tokens(2, 60)
    masks = {slots: masked(60, slots, 2) for slots in (8, 20)}  # of 3 query heads for each key/value head
    mask = torch.stack([masks[20]] * 3 + [masks[8]] * 3).expand(2, -1, -1, -1)
    expected = source(x, attention_mask=mask).logits
    close(student(source, exact=True, slots_by_layer=[[20, 8]] * 3)(x).logits, expected, 1e-4)
    assert (masked_teacher(source, x, 20, 2) - expected).abs().max() > 0.1


@pytest.mark.parametrize("num_sinks", [0, 2, 15])
def test_exact_window_start_is_masked_softmax_beyond(num_sinks):
    source, x = teacher(), tokens(2, 60)
    expected = masked_teacher(source, x, 16, num_sinks)
    close(student(source, exact=True, num_sinks=num_sinks)(x).logits, expected, 1e-4)
    assert (expected - source(x).logits).abs().max() > 0.1


@pytest.mark.parametrize("start", ["window", "routed"])
def test_exact_hybrid_is_the_teacher_up_to_slots_and_window(start):
    source, x = teacher(), tokens(2, 40)
    model = student(source, exact=True, start=start, hybrid_window=5)
    close(model(x[:, :21]).logits, source(x[:, :21]).logits, 1e-4)
    assert (model(x).logits - source(x).logits).abs().max() > 0.1


@pytest.mark.parametrize(("window", "num_sinks"), [(1, 2), (5, 0), (5, 15), (16, 2), (70, 2)])
def test_exact_hybrid_is_masked_softmax_beyond(window, num_sinks):
    """Over the sinks and the last tokens, as many as ring and window hold together."""
    source, x = teacher(), tokens(2, 60)
    expected = masked_teacher(source, x, 16 + window, num_sinks)
    close(student(source, exact=True, num_sinks=num_sinks, hybrid_window=window)(x).logits, expected, 1e-4)


def test_exact_routed_start_is_the_teacher_up_to_num_slots():
    source, x = teacher(), tokens(2, 40)
    model = student(source, exact=True, start="routed")
    close(model(x[:, :16]).logits, source(x[:, :16]).logits, 1e-4)
    assert (model(x).logits - student(source, exact=True)(x).logits).abs().max() > 0.1  # beyond it is no window


def test_tokens_of_equal_importance_are_a_window():
    source, x = teacher(), tokens(2, 60)
    model = student(source, exact=True, start="routed")
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.zero_()
    close(model(x).logits, masked_teacher(source, x, 16, 2), 1e-4)


def test_default_gates_start_near_the_exact_ones():
    x = tokens(2, 60)
    close(student()(x).logits.softmax(-1), student(exact=True)(x).logits.softmax(-1), 0.05)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_softmax_attention_brings_the_teacher_back(options):
    source, x = teacher(), tokens(2, 40)
    model = shake(student(source, **options))
    before, kinds = model(x).logits, model.model.layer_kinds
    with model.softmax_attention():
        assert torch.equal(model(x).logits, source(x).logits)
    assert torch.equal(model(x).logits, before)
    assert model.model.layer_kinds == kinds


def test_softmax_attention_ends_with_an_error_too():
    model = student()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"), model.softmax_attention():
        model()
    assert set(model.model.layer_kinds) == {"linear_attention"}


def test_sliding_window_teacher():
    source, x = sliding_teacher(window=12), tokens(2, 40)
    types = ["linear_attention", "sliding_attention", "linear_attention"]
    model = student(source, exact=True, layer_types=types, sliding_window=12, num_slots=12, num_sinks=0)
    close(model(x).logits, source(x).logits, 1e-4)
    with model.softmax_attention():
        close(model(x).logits, source(x).logits, 1e-5)
    stepwise, _ = in_pieces(model, x, [20] + [1] * 20)
    close(stepwise, model(x).logits)


def in_pieces(model, x, lengths, **kwargs):
    cache, logits, start = None, [], 0
    for length in lengths:
        out = model(x[:, start : start + length], past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        logits.append(out.logits)
        start += length
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("lengths", [[40], [1] * 40, [17, 1, 1, 20, 1], [39, 1]])
def test_cached_in_pieces_is_whole(model, lengths):
    x = tokens(2, 40)
    pieces, cache = in_pieces(model, x, lengths)
    close(pieces, model(x, use_cache=False).logits)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize(
    "options",
    [{}, {"hybrid_window": 7}, {"start": "routed"}, {"hybrid_window": 7, "slots_by_layer": [8, [24, 8], 12]}],
)
def test_state_does_not_grow(options):
    model = student(**options)
    caches = [in_pieces(model, tokens(1, sum(pieces)), pieces)[1] for pieces in ([1], [5, 1], [100], [90, 9, 1])]
    assert {cache_bytes(cache) for cache in caches} == {model.config.state_bytes(4)}
    for held in (x for cache in caches for layer in cache.layers for slots in layer.groups for x in slots.tensors()):
        assert held.untyped_storage().nbytes() == held.nbytes  # no view of more


def test_left_padding_is_none(model):
    x = tokens(2, 30)
    padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), x], 1)
    mask = (torch.arange(39) >= 9).long().expand(2, -1)
    close(model(padded, attention_mask=mask).logits[:, 9:], model(x).logits)


@pytest.mark.parametrize("lengths", [[4, 35], [12, 10, 17], [9] + [1] * 30])
def test_left_padding_in_pieces_is_none(model, lengths):
    x = tokens(2, 30)
    padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), x], 1)
    mask, cache, logits, end = (torch.arange(39) >= 9).long().expand(2, -1), None, [], 0
    for length in lengths:
        start, end = end, end + length
        out = model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    close(torch.cat(logits, 1)[:, 9:], model(x).logits)


def test_right_padding_is_none(model):
    x = tokens(2, 30)
    padded = torch.cat([x, torch.zeros(2, 9, dtype=torch.long)], 1)
    mask = (torch.arange(39) < 30).long().expand(2, -1)
    close(model(padded, attention_mask=mask).logits[:, :30], model(x).logits)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [3, 1], [4]])
def test_a_right_padded_prompt_goes_on(model, lengths):
    """Sequences of different lengths, that then go on side by side, are each alone."""
    ends, x = (30, 22, 5), tokens(3, 34)
    mask = (torch.arange(30) < torch.tensor(ends)[:, None]).long()
    cache = model(x[:, :30], attention_mask=mask, use_cache=True).past_key_values
    places, logits = [torch.arange(end, end + 4) for end in ends], []
    then, came = x.gather(1, torch.stack(places)), 0
    for length in lengths:
        mask = torch.cat([mask, torch.ones(3, length, dtype=torch.long)], 1)
        some = then[:, came : came + length]
        logits.append(model(some, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        came += length
    for row, place, got in zip(x, places, torch.cat(logits, 1), strict=True):
        close(got, model(row[None, : place[-1] + 1]).logits[0, -4:])


def test_a_sequence_that_drops_out_is_left_as_it_is(model):
    x, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 26:30] = 0
    cache = model(x[:, :26], attention_mask=mask[:, :26], use_cache=True).past_key_values
    for t in range(26, 40):
        last = model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True).logits
    close(last[0], model(x[:1]).logits[0, -1:])
    close(last[1], model(torch.cat([x[1:, :26], x[1:, 30:]], 1)).logits[0, -1:])


@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids"])
def test_packed_is_each_document_alone(model, how):
    documents = [tokens(1, n, seed=n) for n in (13, 1, 27)]
    packed = torch.cat(documents, 1)
    where = {
        "cu_seqlens": torch.tensor([0, 13, 14, 41]),
        "position_ids": torch.cat([torch.arange(d.shape[1]) for d in documents])[None],
    }[how]
    alone = torch.cat([model(d).logits for d in documents], 1)
    close(model(packed, **{how: where}).logits, alone)
    with model.softmax_attention():
        alone = torch.cat([model(d).logits for d in documents], 1)
        close(model(packed, **{how: where}).logits, alone)


def test_bad_inputs_are_named():
    model, x = student(), tokens(2, 8)
    with pytest.raises(ValueError, match="packed documents come as one row"):
        model(x, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="restart within several rows"):
        model(x, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2))
    with pytest.raises(ValueError, match="padding between tokens"):
        model(x, attention_mask=torch.tensor([[1] * 8, [1, 1, 0, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
        model(x, attention_mask=torch.ones(2, 1, 8, 8))
    with model.softmax_attention(), pytest.raises(ValueError, match="does not fit these layers"):
        model(x, past_key_values=T2RCache(model.config))
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="of all tokens, 8 in the cache and 8 that come; it is of 8"):
        model(x, attention_mask=torch.ones(2, 8), past_key_values=cache)
    model = student(hybrid_window=7)
    cache, mask = model(x, use_cache=True).past_key_values, torch.ones(2, 16)
    mask[1, 8:11] = 0
    with pytest.raises(ValueError, match="padding between tokens that a window holds and those that come"):
        model(x, attention_mask=mask, past_key_values=cache)


def test_a_cache_of_inference_mode_serves_outside_it(model):
    x = tokens(1, 20)
    with torch.inference_mode():
        cache = model(x[:, :19], use_cache=True).past_key_values
    close(model(x[:, 19:], past_key_values=cache, use_cache=True).logits, model(x).logits[:, 19:])


def test_layers_on_several_devices():
    positions = Positions.resolve(torch.zeros(2, 5, 3), torch.ones(2, 5), None, None, 0).to("meta")
    assert {x.device.type for x in (positions.ids, positions.offset, positions.padding)} == {"meta"}


def test_paper_start_is_the_papers_layer():
    """One attention layer, written out from the paper: arXiv 2409.07146, equations 9 to 11 and section 3.3."""
    model, x = shake(student(start="paper")), torch.randn(1, 30, 48, generator=torch.Generator().manual_seed(0))
    layer, config = model.model.layers[0].self_attn, model.config
    positions = Positions.resolve(x, None, None, None, 0)
    slots = {16: slot_schedule(positions, config)}
    actual = layer(x, positions, slots, model.model.rotary_emb(x, positions.ids), None, None)

    silu = torch.nn.functional.silu
    q, k, v = (silu(p(x)).unflatten(-1, (-1, 8))[0] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    alpha = layer.f_proj(x).sigmoid().pow(1 / 8).unflatten(-1, (2, 16))[0]
    keys, values, outputs = torch.zeros(2, 16, 8), torch.zeros(2, 16, 8), []
    for t in range(30):
        keys = alpha[t][..., None] * keys + (1 - alpha[t])[..., None] * k[t][:, None]
        values = alpha[t][..., None] * values + (1 - alpha[t])[..., None] * v[t][:, None]
        heads = [values[i // 3].T @ (keys[i // 3] @ q[t, i]).softmax(0) for i in range(6)]
        outputs.append(silu(torch.cat(heads)))
    o = torch.stack(outputs)
    o = o * (o.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * layer.g_norm.weight
    close(actual[0], layer.o_proj(o))


def test_cached_teacher(model):
    x = tokens(2, 20)
    with model.softmax_attention():
        pieces, _ = in_pieces(model, x, [12, 1, 7])
        close(pieces, model(x).logits)
