"""The loss of what a student predicts, beside what its teacher does."""

import torch
from torch import Tensor, nn

from t2r.training.adapters import base_of
from t2r.training.config import LossConfig
from t2r.training.objective import chunked_loss, token_loss
from t2r.training.teachers import Teacher


def predicted_loss(
    model: nn.Module,
    teacher: Teacher,
    inputs: dict[str, Tensor],
    labels: Tensor,
    weights: LossConfig,
    sharded: bool = False,
) -> Tensor:
    """Distillation and cross-entropy, summed over all positions with a target.

    Args:
        model: the student, as it was prepared for training: wrapped by DDP, say.
        teacher: what it learns from.
        inputs: of both models' forward passes.
        labels: targets, `[B, T]`, unshifted, -100 for none.
        weights: of the loss's parts.
        sharded: whether the student's weights are sharded (FSDP2). Then a teacher within the student is run through
            the whole of it, which gathers the weights, rather than by itself.

    Returns:
        A scalar, fp32.
    """
    per_token = token_loss(weights)
    student = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    reference = None
    if weights.distill:
        with teacher.active(student) as base:
            shared = base is base_of(student)
            network = model if sharded and shared else base
            hidden = network(**inputs, skip_logits=True, use_cache=False).hidden_states[0]
        reference = hidden, None if shared else base.lm_head

    def loss(head: nn.Module, hidden: Tensor) -> Tensor:
        teacher_hidden, teacher_head = reference or (None, None)
        return chunked_loss(head, hidden, labels, teacher_hidden, per_token, teacher_head)

    with torch.enable_grad():
        return model(**inputs, loss_from_hidden=loss, use_cache=False).loss
