"""The gradient of a choice that has none: how the importance of a token would change what slots hold."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2r_kernels.api import HAS_TRITON
from t2r_kernels.gate import FLATTEST, Gate

if HAS_TRITON:
    from t2r_kernels.triton.choice import gradient_on_gpu


def straight_through(
    logits: Tensor, importance: Tensor, gate: Gate, positions: Tensor, num_sinks: int, temperature: float
) -> Tensor:
    """Gate logits as they are, whose gradients reach the importance by which slots were chosen.

    `evict` takes over one slot, and to take another is no small step: the choice has no gradient. In the backward pass
    it is as if each token had been written into every slot, as strongly as the softmax of `log(rate × age)` over
    `temperature` says (a straight-through estimator, arXiv 1308.3432), where `log(rate)` is `-importance`. While a
    sequence's slots fill there is no choice. Sequences begin with empty slots.

    Args:
        logits: of gates, `[B, T, H, M]`.
        importance: the negative logarithm of `evict`'s rates, `[B, T, H]` fp32; sinks' matters not.
        gate: how logits become gates. Its slots are `evict`'s, `[B, T, H]`, -1 where a place holds no token.
        positions: of each token in its own sequence, `[B, T]` integers.
        num_sinks: a sequence's first tokens, whose slots are never taken over.
        temperature: the lower, the more the gradient is of the slots that are nearly taken over, and those alone.

    Returns:
        `logits`.
    """
    return _StraightThrough.apply(logits, importance, gate, positions, num_sinks, temperature)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, importance, gate, positions, num_sinks, temperature):
        ctx.save_for_backward(logits, importance, gate.slot, positions.expand(importance.shape[:2]))
        ctx.options = gate[1:], num_sinks, temperature
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        logits, importance, slot, positions = ctx.saved_tensors
        gating, *options = ctx.options
        by_kernel = grad.is_cuda and HAS_TRITON and not torch.compiler.is_compiling()
        gradient = gradient_on_gpu if by_kernel else _gradient
        found = gradient(grad, logits, importance, Gate(slot, *gating), positions, *options)
        return grad, found, None, None, None, None


def _gradient(
    grad: Tensor, logits: Tensor, importance: Tensor, gate: Gate, positions: Tensor, num_sinks: int, temperature: float
) -> Tensor:
    """By importance, `[B, T, H]`, from that by logits. Arguments as for `straight_through`."""
    place = torch.arange(logits.shape[1], device=logits.device)[:, None, None]  # [T, 1, 1]
    taken = gate.slot.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)  # [B, T, H, M]
    written = torch.where(taken, place, -1).cummax(1).values
    written = F.pad(written, (0, 0, 0, 0, 1, 0), value=-1)[:, :-1]  # the place of what each slot holds as a token comes
    positions = positions[:, :, None, None]
    chosen = (positions >= logits.shape[-1]) & (gate.slot >= 0).unsqueeze(-1)  # [B, T, H, 1]: there was a choice
    open_ = chosen & (written >= (place - positions + num_sinks).clamp_min(0))
    of_held = importance.unsqueeze(-1).expand(written.shape).gather(1, written.clamp_min(0))
    age = (place - written).log() - of_held  # log(rate × age)
    strengths = (age / temperature).masked_fill(~open_, -1e30).softmax(-1) * open_
    # Strengths are 1 - α.
    sigmoid = torch.sigmoid(logits.float() + torch.where(taken, -gate.write_logit, gate.keep_logit))
    slope = sigmoid ** (1 / gate.normalizer) * (1 - sigmoid) / gate.normalizer
    by_strength = -grad.float() / slope.clamp_min(FLATTEST)
    mean = (strengths * by_strength).sum(-1, keepdim=True)
    by_age = strengths * (by_strength - mean) / temperature
    return -torch.zeros_like(by_age).scatter_add_(1, written.clamp_min(0), by_age).sum(-1)
