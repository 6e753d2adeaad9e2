"""Which slot a routed token takes over."""

import pytest
import torch

from t2r.model import T2RConfig, new_parameters, new_tensors
from t2r.model.heads import head_groups, in_order
from t2r.model.positions import Positions
from t2r.model.routing import Router, routed_schedule
from t2r_kernels import evict
from tests.model.tiny import SHAPE, shake, student, tokens

CONFIG = T2RConfig(**SHAPE, start="routed", num_slots=8, num_sinks=2)


def positions(B, T, **options):
    given = {"attention_mask": None, "position_ids": None, "cu_seqlens": None, "past": 0} | options
    return Positions.resolve(torch.zeros(B, T, 1), **given)


def test_important_tokens_age_slowly_and_sinks_not_at_all():
    importance = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0))
    ((slots, held),) = routed_schedule(importance, positions(1, 50), CONFIG, CONFIG.head_groups(0))
    rates = (-importance).exp()
    rates[:, :2] = 0
    expected, left = evict(rates, torch.arange(50)[None], 8)
    assert torch.equal(slots, expected)
    assert torch.equal(held.positions, left.positions)
    assert set(slots[0, 8:].flatten().tolist()) == set(range(2, 8))


def test_heads_that_differ_are_scheduled_by_themselves():
    importance = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    groups = head_groups([8, 5, 8])
    (few, _), (many, held) = routed_schedule(importance, positions(2, 40), CONFIG, groups)
    for slots, heads, count in ((few, [1], 5), (many, [0, 2], 8)):
        alone = routed_schedule(importance[..., heads], positions(2, 40), CONFIG, head_groups([count] * len(heads)))
        assert torch.equal(slots, alone[0][0])
    assert held.rates.shape == (2, 2, 8)
    assert torch.equal(in_order([few, many], groups)[..., 1], few[..., 0])


def test_padding_takes_no_slot():
    importance, mask = torch.randn(2, 30, 2), torch.ones(2, 30).long()
    mask[1, :7] = 0
    groups = CONFIG.head_groups(0)
    ((slots, _),) = routed_schedule(importance, positions(2, 30, attention_mask=mask), CONFIG, groups)
    ((alone, _),) = routed_schedule(importance[1:, 7:], positions(1, 23), CONFIG, groups)
    assert (slots[1, :7] == -1).all()
    assert torch.equal(slots[1:, 7:], alone)


def test_scores_beyond_bounds_are_finite():
    router = Router(CONFIG)
    router.weight.fill_(1e9)
    importance = router(torch.randn(1, 5, 48))
    assert importance.dtype == torch.float32
    assert (importance.exp() > 0).all()
    assert (importance.neg().exp() > 0).all()
    assert importance.exp().isfinite().all()


def test_a_router_is_no_parameter_and_is_saved(tmp_path):
    model = shake(student(start="routed"))
    config = model.config
    assert set(new_tensors(config)) - set(new_parameters(config)) == {"router.weight", "router.bias"}
    assert not any("router" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].self_attn.router.weight, model.model.layers[1].self_attn.router.weight)


def test_the_state_counts_what_slots_are_worth():
    window = T2RConfig(**SHAPE, start="window", num_slots=8, num_sinks=2)
    assert CONFIG.state_elements() - window.state_elements() == 3 * 2 * 8 * 2


@pytest.mark.parametrize("start", ["window", "routed"])
def test_slots_beyond_sinks(start):
    with pytest.raises(ValueError, match=r"num_sinks must be .* below num_slots"):
        T2RConfig(**SHAPE, start=start, num_slots=4, num_sinks=4)


@pytest.mark.parametrize("options", [{}, {"slots_by_layer": [8, [20, 12], 16]}, {"hybrid_window": 6}])
def test_a_router_that_trains_routes_as_before(options):
    model, x = shake(student(start="routed", **options)), tokens(2, 50)
    before = model(x).logits
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.let_train()
    after = model(x).logits
    assert torch.equal(after, before)
    after.square().mean().backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers)
    assert model.state_dict().keys() == student(start="routed", **options).state_dict().keys()
