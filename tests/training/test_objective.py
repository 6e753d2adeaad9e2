import pytest
import torch
import torch.nn.functional as F
from torch import nn

import t2r.training.objective
from t2r.training.config import LossConfig
from t2r.training.objective import chunked_loss, divergence, token_loss


def lumped(p, kept):
    """Probabilities of the kept tokens, and of all others as one."""
    chosen = p.gather(-1, kept)
    return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)


def direct(head, hidden, labels, teacher_hidden, weights):
    """The same sums with all logits at once, as the definitions say."""
    wanted = labels[:, 1:] != -100
    student, reference = head(hidden[:, :-1][wanted]), head(teacher_hidden[:, :-1][wanted]).detach()
    p = (reference / weights.temperature).softmax(-1)
    q = (student / weights.temperature).softmax(-1)
    if weights.top_k:
        kept = p.topk(weights.top_k, -1).indices
        p, q = lumped(p, kept), lumped(q, kept)
    if weights.direction == "reverse":
        p, q = q, p
    kl = (p * (p.log() - q.log())).sum() * weights.temperature**2
    ce = F.cross_entropy(student, labels[:, 1:][wanted], reduction="sum")
    return weights.distill * kl + weights.cross_entropy * ce


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
@pytest.mark.parametrize(
    "weights",
    [
        LossConfig(),
        LossConfig(distill=0.0, cross_entropy=1.0),
        LossConfig(distill=0.7, cross_entropy=0.3, temperature=2.5),
        LossConfig(direction="reverse"),
        LossConfig(top_k=3),
        LossConfig(top_k=4, direction="reverse", temperature=2.0),
    ],
    ids=["kl", "ce", "both, hot", "reverse", "top 3", "top 4 of reverse, hot"],
)
def test_chunked_is_direct(weights, tokens_at_once, head_trains, dense, monkeypatch):
    monkeypatch.setattr(t2r.training.objective, "LOGITS_AT_ONCE", tokens_at_once * 11)
    torch.manual_seed(0)
    head = nn.Linear(6, 11).requires_grad_(head_trains)
    hidden = torch.randn(2, 15, 6, requires_grad=True)
    teacher_hidden = torch.randn(2, 15, 6)
    labels = torch.randint(0, 11, (2, 15))
    labels[0, [0, 4, 5]] = -100
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = direct(head, hidden, labels, teacher_hidden, weights)
    actual = chunked_loss(head, hidden, labels, teacher_hidden, token_loss(weights), dense=dense)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(actual * 3, wanted), torch.autograd.grad(expected * 3, wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_top_of_everything_is_everything():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    assert torch.equal(divergence(student, teacher, top_k=7), divergence(student, teacher))
    assert (
        0 < divergence(student, teacher, top_k=2).sum() < divergence(student, teacher).sum()
    )  # lumping loses information


def test_no_divergence_from_oneself():
    head, hidden = nn.Linear(6, 11), torch.randn(1, 9, 6)
    labels = torch.randint(0, 11, (1, 9))
    assert chunked_loss(head, hidden, labels, hidden, token_loss(LossConfig())).abs() < 1e-5
