"""The loss: KL divergence from the teacher and cross-entropy with the text, a few tokens at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2r.training.config import LossConfig

IGNORED = -100  # the target of a position that has none
LOGITS_AT_ONCE = 2**24  # of one model: 64 MiB in fp32

TokenLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Loss, summed over tokens with a target, of student logits `[n, vocab]`, targets `[n]` and teacher logits or None."""


def token_loss(weights: LossConfig) -> TokenLoss:
    """The loss that a configuration asks for."""
    heat = weights.temperature

    def loss(student: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        total = student.new_zeros(())
        if weights.cross_entropy:
            entropy = F.cross_entropy(student, targets, ignore_index=IGNORED, reduction="sum")
            total = total + weights.cross_entropy * entropy
        if weights.distill:
            if heat != 1:  # a division by one would still go through memory
                student, teacher = student / heat, teacher / heat
            kl = divergence(student, teacher, weights.direction, weights.top_k)
            total = total + weights.distill * heat**2 * torch.where(targets != IGNORED, kl, 0).sum()
        return total

    return loss


def divergence(student: Tensor, teacher: Tensor, direction: str = "forward", top_k: int | None = None) -> Tensor:
    """KL divergence between two models' predictions, for each token.

    Args:
        student: logits, `[n, vocab]`.
        teacher: logits, `[n, vocab]`.
        direction: `forward` for KL(teacher, student), `reverse` for KL(student, teacher).
        top_k: tell apart only the teacher's this many likeliest tokens; the others count as one.

    Returns:
        `[n]`.
    """
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if top_k is not None and top_k < log_p.shape[-1]:
        best = log_p.topk(top_k, -1).indices
        log_q, log_p = (_lumped(x, best) for x in (log_q, log_p))
    if direction == "reverse":
        log_q, log_p = log_p, log_q
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _lumped(log_p: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities of the kept tokens, and of all others together, `[n, k + 1]`."""
    rest = log_p.scatter(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, kept), rest], -1)


def chunked_loss(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    loss: TokenLoss,
    teacher_head: nn.Linear | None = None,
    dense: bool = False,
) -> Tensor:
    """Sum of a loss over all positions with a target, without ever holding the logits of all of them.

    The gradients are computed on the way forward, chunk by chunk, so that nothing is computed twice.

    Args:
        head: the language-modelling head of the student, and of the teacher unless it has its own.
        hidden: the student's last hidden states, `[B, T, hidden]`.
        labels: targets, `[B, T]`, unshifted, -100 for none.
        teacher_hidden: the teacher's, like `hidden`, or None.
        loss: of one chunk.
        teacher_head: the teacher's own.
        dense: compute logits of positions without a target too, which spares the host a look at the labels.

    Returns:
        A scalar, fp32.
    """
    wanted = (labels[:, 1:] != IGNORED).flatten()  # [B * (T - 1)]

    def chosen(x: Tensor) -> Tensor:  # [B, T - 1, ...] to [n, ...]
        x = x.flatten(0, 1)
        return x if dense else x[wanted]

    targets, states = chosen(labels[:, 1:]), chosen(hidden[:, :-1])
    teacher = None if teacher_hidden is None else chosen(teacher_hidden[:, :-1])
    trained = [p for p in head.parameters() if p.requires_grad]
    teacher_head = teacher_head or head
    total = states.new_zeros((), dtype=torch.float32)
    gradients = [torch.zeros_like(x) for x in (states, *trained)]
    at_once = tokens_at_once(head.out_features)
    for start in range(0, len(states), at_once):
        part = slice(start, start + at_once)
        with torch.no_grad():
            reference = None if teacher is None else _logits(teacher_head, teacher[part])
        with torch.enable_grad():
            chunk = states[part].detach().requires_grad_()
            value = loss(_logits(head, chunk), targets[part], reference)
        by_state, *by_parameter = torch.autograd.grad(value, [chunk, *trained])
        gradients[0][part] = by_state
        for gradient, more in zip(gradients[1:], by_parameter, strict=True):
            gradient += more
        total += value.detach()
    return delivered(total, [states, *trained], gradients)


def _logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """In fp32. The head is not called: hooks that shard weights would take this for a forward pass of its own."""
    return F.linear(hidden, head.weight, head.bias).float()


def tokens_at_once(vocabulary: int) -> int:
    """For how many tokens there are logits at one time."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def delivered(value: Tensor, parameters: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """`value`, with gradients by the parameters that have been computed already."""
    return _Delivered.apply(value, gradients, *parameters)


class _Delivered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *parameters):  # noqa: ARG004
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)
