"""Attention to the softmax window beside the slots, and the way through it."""

import pytest
import torch

from t2r.model.window import Tokens, joined, window_attention
from tests.model.tiny import student, teacher, tokens


def case(B=2, T=23, HQ=6, H=2, D=4, window=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, HQ, D), (B, window + T, H, D), (B, window + T, H, D)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def masked(q, k, v, ids):
    """Attention to all places under a mask."""
    (_, T, HQ, D), H = q.shape, k.shape[2]
    window = k.shape[1] - T
    k, v = (x.repeat_interleave(HQ // H, 2).transpose(1, 2) for x in (k, v))
    logits = D**-0.5 * q.transpose(1, 2) @ k.mT
    ahead = window + torch.arange(T)[:, None] - torch.arange(window + T)
    seen = (ahead >= 0) & (ahead < window) & (ahead <= ids[..., None])
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


IDS = {
    "start": torch.arange(23).expand(2, 23),
    "later": torch.arange(100, 123).expand(2, 23),
    "packed": torch.cat([torch.arange(n) for n in (3, 1, 8, 11)]).expand(2, 23),
    "padded": torch.stack([torch.arange(23), (torch.arange(23) - 6).clamp_min(0)]),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("window", [1, 5, 6, 23, 40])
def test_it_is_masked_attention(window, ids):
    tensors = case(window=window)
    actual, expected = window_attention(*tensors, ids), masked(*tensors, ids)
    cotangents = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(out, tensors, cotangents) for out in (actual, expected)]
    for a, b in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-12


def test_half_precision_is_computed_in_fp32():
    tensors = [x.detach().bfloat16() for x in case()]
    with torch.autocast("cpu", torch.bfloat16):
        actual = window_attention(*tensors, IDS["later"])
    for a, b in zip(actual, masked(*(x.double() for x in tensors), IDS["later"]), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 1e-5


def test_tokens_leave_as_they_came():
    ids = torch.cat([torch.arange(4), torch.arange(6)])[None]
    new = Tokens(*torch.arange(1.0, 11).expand(3, 1, 10)[..., None, None], torch.arange(10)[None, :, None])
    held = new.after(None, 3)
    gone = held.leaving(ids)
    assert gone.keys.flatten().tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert gone.slots.flatten().tolist() == [-1, -1, -1, 0, -1, -1, -1, 4, 5, 6]
    assert held.last(3).keys.flatten().tolist() == [8, 9, 10]
    assert held.last(3).after(held.last(3), 3).slots.flatten().tolist() == [7, 8, 9] * 2


def test_padding_is_neither_held_nor_pushes_anything_out():
    ids, padding = torch.arange(5).clamp_max(3).expand(3, 5), torch.arange(5) >= torch.tensor([[4], [1], [0]])
    new = Tokens(*torch.arange(1.0, 6).expand(3, 3, 5)[..., None, None], torch.arange(5).expand(3, 5)[..., None])
    held = new.after(None, 3)
    assert held.last(3, padding).keys.flatten(1).tolist() == [[2, 3, 4], [0, 0, 1], [0, 0, 0]]
    assert held.leaving(ids, padding).slots.flatten(1).tolist() == [[-1, -1, -1, 0, -1], [-1] * 5, [-1] * 5]


def test_joined_is_one_softmax_over_both():
    q, k, v = (x.detach() for x in case(H=6, T=9, window=9))
    first, second = (slice(4), slice(4, None))
    scores = torch.einsum("bthd,bshd->bths", q, k)

    def attend(part):
        o = torch.einsum("bths,bshd->bthd", scores[..., part].softmax(-1), v[:, part])
        return o, scores[..., part].logsumexp(-1)

    both, _ = attend(slice(None))
    assert (joined(*attend(first), *attend(second)) - both).abs().max() < 1e-12


def test_where_nothing_is_written_the_window_is_all():
    o, window = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    nothing, lse = torch.full((1, 2, 3), -torch.inf, requires_grad=True), torch.zeros(1, 2, 3, requires_grad=True)
    out = joined(o, nothing, window, lse)
    assert torch.equal(out, window)
    assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), (nothing, lse)))


def test_gradients_are_those_of_masked_softmax():
    """Of a whole model with exact gates: through slots and window to every projection."""
    source, x, generator = teacher(), tokens(2, 40), torch.Generator().manual_seed(0)
    model = student(source, exact=True, hybrid_window=6)
    ahead = torch.arange(40)[:, None] - torch.arange(40)
    seen = (ahead >= 0) & ((torch.arange(40) < 2) | (ahead < 20))
    mask = torch.where(seen, 0.0, -torch.inf).expand(2, 1, 40, 40)
    cotangent = torch.randn(2, 40, 97, generator=generator)
    (model(x).logits * cotangent).sum().backward()
    (source(x, attention_mask=mask).logits * cotangent).sum().backward()
    for name, expected in source.named_parameters():
        actual = model.get_parameter(name)
        assert (actual.grad - expected.grad).norm() < 1e-4 * expected.grad.norm(), name
    gates = [p.grad for name, p in model.named_parameters() if "f_proj" in name]
    assert all(g.isfinite().all() for g in gates)
