"""Gradients of importance, through a choice that has none."""

from itertools import pairwise

import pytest
import torch

from t2r_kernels import Gate, evict, gsa, straight_through
from tests.kernels.cases import assert_near

M, SINKS, TEMPERATURE, WRITE, KEEP = 8, 2, 0.2, 3.0, 4.0


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interpreted(monkeypatch):
    """The Triton kernel, in Triton's interpreter."""
    kernel = pytest.importorskip("t2r_kernels.triton.choice")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setattr("t2r_kernels.choice._gradient", kernel.gradient_on_gpu)
    monkeypatch.setattr(kernel, "LONGEST", 16)


@pytest.fixture(params=["torch", "triton"])
def way(request, monkeypatch):
    if request.param == "triton":
        interpreted(monkeypatch)


def choices(importance, positions, num_slots=M, bounds=None):
    rates = importance.detach().neg().exp().masked_fill((positions < SINKS).unsqueeze(-1), 0.0)
    return evict(rates, positions, num_slots, cu_seqlens=bounds)[0]


def strengths_by_hand(importance, slots, bounds):
    """How strongly each token would be written into each slot, `[T, H, M]`, one document and token after another."""
    rows = []
    for begin, end in pairwise(bounds):
        for head in range(importance.shape[1]):
            held = {}
            for t in range(begin, end):
                row, slot = torch.zeros(M), int(slots[t, head])
                if t - begin < M:
                    row[slot] = 1.0
                else:
                    rest = sorted(i for i in held if held[i] >= begin + SINKS)
                    ages = [torch.tensor(float(t - held[i])).log() - importance[held[i], head] for i in rest]
                    row = row.index_put((torch.tensor(rest),), (torch.stack(ages) / TEMPERATURE).softmax(0))
                    assert row.argmax() == slot
                held[slot] = t
                rows.append((t, head, row))
    rows.sort(key=lambda x: x[:2])
    return torch.stack([row for *_, row in rows]).view(*importance.shape, M)


@pytest.mark.parametrize("normalizer", [1.0, 2.0])
@pytest.mark.parametrize("bounds", [[0, 60], [0, 5, 5, 25, 60]], ids=["one sequence", "packed"])
def test_it_is_as_if_tokens_were_written_by_strengths(bounds, normalizer, way):
    q, k, v, logits = (draw(1, 60, 2, M, seed=i) for i in range(4))
    importance, expected = draw(1, 60, 2, seed=4).requires_grad_(), draw(1, 60, 2, 8, seed=5)
    packed = torch.tensor(bounds)
    positions = torch.cat([torch.arange(n) for n in packed.diff().tolist()])[None]
    gate = Gate(choices(importance, positions, bounds=packed), WRITE, KEEP, normalizer)

    def loss(**gates):
        return ((gsa(q, k, v, cu_seqlens=packed, hide_unwritten=True, **gates)[0] - expected) ** 2).sum()

    same = straight_through(logits, importance, gate, positions, SINKS, TEMPERATURE)
    assert torch.equal(same, logits)
    (ours,) = torch.autograd.grad(loss(g=same, gate=gate), importance)

    # By the derivative of the loss by gates as they are, and that of strengths by importance.
    taken = gate.slot.unsqueeze(-1) == torch.arange(M)
    alpha = (torch.sigmoid(logits + torch.where(taken, -WRITE, KEEP)) ** (1 / normalizer)).requires_grad_()
    (by_gate,) = torch.autograd.grad(loss(g=alpha.log(), s=1 - alpha), alpha)
    strengths = strengths_by_hand(importance[0], gate.slot[0], bounds)
    (wanted,) = torch.autograd.grad(-(by_gate[0] * strengths).sum(), importance)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


def found(logits, importance, positions, grad, **options):
    """The gradient by importance."""
    importance = importance.detach().requires_grad_()
    gate = Gate(choices(importance, positions, logits.shape[-1], **options), WRITE, KEEP)
    out = straight_through(logits, importance, gate, positions, SINKS, TEMPERATURE)
    return torch.autograd.grad(out, importance, grad)[0]


def test_gradients_of_logits_pass(way):
    logits, importance = draw(1, 20, 2, M).requires_grad_(), draw(1, 20, 2).requires_grad_()
    gate = Gate(choices(importance, torch.arange(20)[None]), WRITE, KEEP)
    out = straight_through(logits, importance, gate, torch.arange(20)[None], SINKS, TEMPERATURE)
    grad = draw(1, 20, 2, M, seed=1)
    assert torch.equal(torch.autograd.grad(out, logits, grad)[0], grad)


@pytest.mark.parametrize("T", [1, 8, 9, 50])
@pytest.mark.parametrize("num_slots", [5, 8, 20])
def test_rows_are_each_alone(T, num_slots, way):
    logits, importance, grad = draw(2, T, 2, num_slots), draw(2, T, 2, seed=1), draw(2, T, 2, num_slots, seed=2)
    positions = torch.arange(T)[None]
    together = found(logits, importance, positions, grad)
    assert together.isfinite().all()
    assert bool(together.any()) == (num_slots < T)
    for row in range(2):
        one = slice(row, row + 1)
        alone = found(logits[one], importance[one], positions, grad[one])
        assert_near({"importance": alone}, {"importance": together[one]}, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part(side, way):
    logits, importance, grad = draw(1, 40, 2, M), draw(1, 40, 2, seed=1), draw(1, 40, 2, M, seed=2)
    alone = found(logits, importance, torch.arange(40)[None], grad)
    pad, here = ((5, 0), slice(5, None)) if side == "left" else ((0, 5), slice(0, 40))
    padded = [torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + pad, value=3.0) for x in (logits, importance, grad)]
    places = torch.nn.functional.pad(torch.arange(40)[None], pad, value=-1)
    gradient = found(padded[0], padded[1], places, padded[2])
    assert_near({"importance": gradient[:, here]}, {"importance": alone}, 1e-5)
    assert not gradient[places < 0].any()


def test_gates_that_cannot_move_leave_gradients_finite(way):
    logits, importance, grad = draw(1, 40, 2, M) * 200, draw(1, 40, 2, seed=1) * 30, draw(1, 40, 2, M, seed=2)
    assert found(logits, importance, torch.arange(40)[None], grad).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_slots", [5, 32, 64, 128, 200, 256])
def test_on_a_gpu(num_slots, dtype):
    bounds = torch.tensor([0, 3, 3, 700, 1000, 3000])
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    logits, grad = (draw(1, 3000, 3, num_slots, seed=i).to(dtype) for i in range(2))
    tensors, options = (logits, draw(1, 3000, 3, seed=2), positions, grad), {"bounds": bounds}
    expected = found(*tensors, **options)
    ours = [found(*(x.cuda() for x in tensors), bounds=bounds.cuda()) for _ in range(2)]
    assert torch.equal(*ours)
    assert_near({"importance": ours[0].cpu()}, {"importance": expected}, 1e-4)
    assert expected.norm() > 1
