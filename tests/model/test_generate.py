"""`generate` with a state of constant size."""

import pytest
import torch

from t2r.model import T2RCache
from tests.model.tiny import shake, student, tokens

MODELS = {
    "all slots": {},
    "mixed": {"layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    "routed": {"start": "routed"},
    "hybrid": {"hybrid_window": 6},
    "hybrid, routed": {"hybrid_window": 6, "start": "routed"},
    "layers and heads differ": {"start": "routed", "slots_by_layer": [8, [20, 12], 16]},
}


@pytest.fixture(params=MODELS)
def model(request):
    return shake(student(**MODELS[request.param]))


def by_hand(model, x, count):
    """Greedy decoding that runs the whole sequence again for every token."""
    with torch.no_grad():
        for _ in range(count):
            x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return x


OPTIONS = {"eos_token_id": None, "pad_token_id": 0}


def test_greedy(model):
    x = tokens(2, 10)
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=30, do_sample=False, **OPTIONS)
    assert torch.equal(out, by_hand(model, x, 30))


def test_left_padded_batch_is_each_prompt_alone(model):
    prompts = [tokens(1, n, seed=n) for n in (3, 11, 20)]
    batch = torch.cat([torch.nn.functional.pad(p, (20 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (20 - p.shape[1], 0)) for p in prompts])
    out = model.generate(batch, attention_mask=mask, max_new_tokens=25, do_sample=False, **OPTIONS)
    for row, prompt in zip(out, prompts, strict=True):
        assert torch.equal(row[20 - prompt.shape[1] :], by_hand(model, prompt, 25)[0])


def test_beams_with_cache_are_beams_without(model):
    x = tokens(2, 10)
    options = dict(attention_mask=torch.ones_like(x), max_new_tokens=20, num_beams=4, do_sample=False, **OPTIONS)
    cached = model.generate(x, **options)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))
    assert not torch.equal(cached, by_hand(model, x, 20))  # beams did find something else


def test_sampling_with_cache_is_sampling_without(model):
    x = tokens(3, 10)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(
            model.generate(
                x, attention_mask=torch.ones_like(x), max_new_tokens=20, do_sample=True, use_cache=use_cache, **OPTIONS
            )
        )
    assert torch.equal(*outputs)


def test_several_samples_of_one_prompt_differ(model):
    x = tokens(1, 10)
    torch.manual_seed(5)
    out = model.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=10, do_sample=True, num_return_sequences=4, **OPTIONS
    )
    assert len({tuple(row.tolist()) for row in out}) > 1


def test_a_cache_can_be_continued(model):
    x = tokens(1, 12)
    cache = T2RCache(model.config)
    options = {"max_new_tokens": 8, "do_sample": False, "past_key_values": cache, **OPTIONS}
    first = model.generate(x, attention_mask=torch.ones_like(x), **options)
    more = torch.cat([first, tokens(1, 5, seed=9)], 1)
    second = model.generate(more, attention_mask=torch.ones_like(more), **options)
    assert torch.equal(second, by_hand(model, more, 8))


def test_a_reset_cache_is_a_new_one(model):
    x, cache = tokens(1, 12), T2RCache(model.config)
    options = {"max_new_tokens": 20, "do_sample": False, "past_key_values": cache, **OPTIONS}
    model.generate(tokens(1, 30, seed=1), attention_mask=torch.ones(1, 30, dtype=torch.long), **options)
    cache.reset()
    assert torch.equal(model.generate(x, attention_mask=torch.ones_like(x), **options), by_hand(model, x, 20))


def test_other_cache_kinds_are_refused(model):
    with pytest.raises(ValueError, match="constant size already"):
        model.generate(tokens(1, 4), cache_implementation="static", max_new_tokens=2, **OPTIONS)


def test_cropping_is_refused():
    cache = T2RCache(student().config)
    with pytest.raises(RuntimeError, match="recurrent state"):
        cache.crop(-1)
