import pytest
import torch
import torch.nn.functional as F
from torch import nn

import t2r.training.objective
from t2r.training.config import LossConfig
from t2r.training.objective import chunked_loss, token_loss


def direct(head, hidden, labels, teacher_hidden, weights):
    """The same sums with all logits at once, as the definitions say."""
    wanted = labels[:, 1:] != -100
    student, reference = head(hidden[:, :-1][wanted]), head(teacher_hidden[:, :-1][wanted]).detach()
    p = (reference / weights.temperature).softmax(-1)
    q = (student / weights.temperature).softmax(-1)
    kl = (p * (p.log() - q.log())).sum() * weights.temperature**2
    ce = F.cross_entropy(student, labels[:, 1:][wanted], reduction="sum")
    return weights.distill * kl + weights.cross_entropy * ce


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
@pytest.mark.parametrize(
    "weights", [LossConfig(), LossConfig(0.0, 1.0), LossConfig(0.7, 0.3, 2.5)], ids=["kl", "ce", "both, hot"]
)
def test_chunked_is_direct(weights, tokens_at_once, head_trains, monkeypatch):
    monkeypatch.setattr(t2r.training.objective, "TOKENS_AT_ONCE", tokens_at_once)
    torch.manual_seed(0)
    head = nn.Linear(6, 11).requires_grad_(head_trains)
    hidden = torch.randn(2, 15, 6, requires_grad=True)
    teacher_hidden = torch.randn(2, 15, 6)
    labels = torch.randint(0, 11, (2, 15))
    labels[0, [0, 4, 5]] = -100
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = direct(head, hidden, labels, teacher_hidden, weights)
    actual = chunked_loss(head, hidden, labels, teacher_hidden, token_loss(weights))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(actual * 3, wanted), torch.autograd.grad(expected * 3, wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_no_divergence_from_oneself():
    head, hidden = nn.Linear(6, 11), torch.randn(1, 9, 6)
    labels = torch.randint(0, 11, (1, 9))
    assert chunked_loss(head, hidden, labels, hidden, token_loss(LossConfig())).abs() < 1e-5
