"""The simulation of merging, beside the model."""

import pytest
import torch

from benchmarks.merging import WAYS, Way, attend, simulated
from tests.model.tiny import shake, student, tokens


@torch.no_grad()
def test_overwriting_is_the_model():
    model, x = shake(student(start="routed", exact=True, slots_by_layer=[[20, 8], 16, 12])), tokens(2, 40)
    expected = model(x).logits
    with simulated(WAYS["overwritten"]):
        assert (model(x).logits - expected).abs().max() < 2e-4
    with simulated(WAYS["evicted/any"]):
        assert (model(x).logits - expected).abs().max() > 0.01
    assert torch.equal(model(x).logits, expected)


@pytest.mark.parametrize(("merged", "num_slots"), [("evicted", 7), ("arriving", 4)])
def test_tokens_with_one_key_are_merged_without_loss(merged, num_slots):
    """Three keys come in turns, beside a sink: attention is softmax over all tokens."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([0] + [1, 2, 3] * 11)
    k = torch.randn(1, 4, 2, 8, generator=generator)[:, kind]
    q, v = torch.randn(1, 34, 4, 8, generator=generator), torch.randn(1, 34, 2, 8, generator=generator)
    rates = (torch.arange(34) > 0).float()[None, :, None].expand(1, 34, 2)
    way = Way(merged, alike=0.99)
    wide = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *wide, is_causal=True)
    actual = attend(q, k, v, rates, num_slots, 1, way)
    assert (actual - expected.transpose(1, 2)).abs().max() < 1e-5
    other = attend(q, k, v, rates, num_slots, 1, Way(merged, alike=0.99, counted=False))
    assert (other - expected.transpose(1, 2)).abs().max() > 0.01
