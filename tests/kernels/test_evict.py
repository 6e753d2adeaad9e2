"""Which slot each token takes over: the oldest for its rate."""

from itertools import pairwise

import pytest
import torch

from t2r_kernels import Held, evict, evict_groups

M = 8


def by_hand(rates):
    """Slots of one sequence and head, from its tokens' rates."""
    held, slots = [], []
    for t, rate in enumerate(rates.tolist()):
        if t < M:
            slot = t
            held.append((rate, t))
        else:
            worn = [old * (t - since) for old, since in held]
            slot = worn.index(max(worn))
            held[slot] = rate, t
        slots.append(slot)
    return slots, held


def rates_of(B, T, H=2, seed=0):
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(seed)).exp()


def positions_of(B, T, past=0):
    return torch.arange(past, past + T).expand(B, T)


def interpreted(rates, positions, num_slots, held=None, cu_seqlens=None):
    """The Triton kernel, in Triton's interpreter."""
    kernel = pytest.importorskip("t2r_kernels.triton.evict")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    positions = positions.expand(rates.shape[:2]).int().contiguous()
    slots, *left = kernel.evict_on_gpu(rates, positions, num_slots, held, cu_seqlens)
    return slots, None if cu_seqlens is not None else Held(*left)


@pytest.fixture(params=[evict, interpreted], ids=["torch", "triton"])
def way(request):
    return request.param


def test_the_oldest_for_its_rate_goes(way):
    rates = rates_of(2, 45)
    slots, held = way(rates, positions_of(2, 45), M)
    assert slots.dtype == torch.int32
    for b in range(2):
        for h in range(2):
            expected, left = by_hand(rates[b, :, h])
            assert slots[b, :, h].tolist() == expected
            assert held.rates[b, h].tolist() == pytest.approx([rate for rate, _ in left])
            assert held.positions[b, h].tolist() == [since for _, since in left]


def test_of_equal_rates_the_oldest_goes_and_rate_zero_never(way):
    rates = torch.full((1, 40, 1), 0.3)
    rates[:, :2] = 0
    slots, _ = way(rates, positions_of(1, 40), M)
    assert slots[0, :, 0].tolist() == [t if t < M else 2 + (t - 2) % (M - 2) for t in range(40)]


def test_half_the_rate_stays_twice_as_long(way):
    rates = torch.ones(1, 60, 1)
    rates[0, 30] = 0.5
    slots, _ = way(rates, positions_of(1, 60), M)
    life = {t: next(u for u in range(t + 1, 60) if slots[0, u, 0] == slots[0, t, 0]) - t for t in (20, 30)}
    assert life[20] == M
    assert life[30] in (2 * M - 2, 2 * M - 1, 2 * M)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 25, 39])
def test_in_pieces_is_whole(cut, way):
    rates = rates_of(2, 40)
    whole, held = way(rates, positions_of(2, 40), M)
    first, left = way(rates[:, :cut].contiguous(), positions_of(2, cut), M)
    before = Held(*(x.clone() for x in left))
    second, then = way(rates[:, cut:].contiguous(), positions_of(2, 40 - cut, cut), M, left)
    assert torch.equal(torch.cat([first, second], 1), whole)
    for a, b, kept, untouched in zip(then, held, left, before, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(kept, untouched)


@pytest.mark.parametrize("bounds", [[0, 5, 30, 31, 60], [0, 60], [0, 8, 8, 17, 60]])
def test_packed_sequences_start_afresh(bounds, way):
    rates, bounds = rates_of(1, 60), torch.tensor(bounds)
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    slots, held = way(rates, positions, M, cu_seqlens=bounds)
    assert held is None
    for start, end in pairwise(bounds.tolist()):
        for h in range(2):
            assert slots[0, start:end, h].tolist() == by_hand(rates[0, start:end, h])[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_slot(side, way):
    rates = rates_of(1, 40)
    slots, held = way(rates, positions_of(1, 40), M)
    pad = (5, 0) if side == "left" else (0, 5)
    padded = torch.nn.functional.pad(rates, (0, 0, *pad), value=3.0)
    positions = torch.nn.functional.pad(positions_of(1, 40), pad, value=-1)
    found, left = way(padded, positions, M)
    here = slice(5, None) if side == "left" else slice(0, 40)
    assert torch.equal(found[:, here], slots)
    assert (found[positions < 0] == -1).all()
    assert all(torch.equal(a, b) for a, b in zip(left, held, strict=True))


GROUPS = [(5, (1,)), (8, (0, 3)), (20, (2,))]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("packed", [False, True])
def test_heads_that_differ_are_each_alone(packed, device):
    rates, positions = rates_of(2, 70, H=4).to(device), positions_of(2, 70).clone().to(device)
    rates[:, :2] = 0  # sinks
    positions[1] -= 9  # padding
    bounds = None
    if packed:
        bounds = torch.tensor([0, 30, 30, 41, 70], device=device)
        positions = torch.cat([torch.arange(n) for n in (30, 11, 29)])[None].to(device)
        rates = rates[:1]
    together = evict_groups(rates, positions, GROUPS, cu_seqlens=bounds)
    for (num_slots, heads), (slots, held) in zip(GROUPS, together, strict=True):
        expected, left = evict(rates[..., list(heads)], positions, num_slots, cu_seqlens=bounds)
        assert torch.equal(slots, expected)
        assert slots.dtype == torch.int32
        assert (held is None) if packed else all(map(torch.equal, held, left))
    if not packed:
        pieces, held = [], []
        for part in (slice(0, 25), slice(25, 26), slice(26, 70)):
            found = evict_groups(rates[:, part], positions[:, part], GROUPS, held)
            pieces.append([slots for slots, _ in found])
            held = [left for _, left in found]
        for i, (slots, left) in enumerate(together):
            assert torch.equal(torch.cat([piece[i] for piece in pieces], 1), slots)
            assert all(map(torch.equal, held[i], left))


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [5, 32, 64, 128, 200])
def test_on_a_gpu(num_slots):
    rates, bounds = rates_of(3, 1000), torch.tensor([0, 3, 3, 700, 1000])
    expected, held = evict(rates, positions_of(3, 1000), num_slots)
    slots, left = evict(rates.cuda(), positions_of(3, 1000).cuda(), num_slots)
    assert torch.equal(slots.cpu(), expected)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(left, held, strict=True))
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    expected, _ = evict(rates[:1], positions, num_slots, cu_seqlens=bounds)
    slots, _ = evict(rates[:1].cuda(), positions.cuda(), num_slots, cu_seqlens=bounds.cuda())
    assert torch.equal(slots.cpu(), expected)


@pytest.mark.gpu
def test_compiled_steps_on_a_gpu():
    rates = rates_of(2, 20).cuda()
    whole, _ = evict(rates, positions_of(2, 20).cuda(), M)
    compiled, held, slots = torch.compile(evict, fullgraph=True), None, []
    for t in range(20):
        slot, held = compiled(rates[:, t : t + 1].contiguous(), positions_of(2, 1, t).cuda(), M, held)
        slots.append(slot)
    assert torch.equal(torch.cat(slots, 1), whole)
