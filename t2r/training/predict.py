"""The loss of what a student predicts, beside what its teacher does."""

import torch
from peft import PeftModel
from torch import Tensor, nn

from t2r.model import T2RForCausalLM
from t2r.training.adapters import base_of
from t2r.training.config import LossConfig
from t2r.training.objective import chunked_loss, token_loss
from t2r.training.teachers import Teacher, way_into


def predicted_loss(
    model: nn.Module,
    student: T2RForCausalLM | PeftModel,
    teacher: Teacher,
    inputs: dict[str, Tensor],
    labels: Tensor,
    weights: LossConfig,
    sharded: bool = False,
    dense: bool = False,
) -> Tensor:
    """Distillation and cross-entropy, summed over all positions with a target.

    Args:
        model: the student as it was prepared for training: wrapped by DDP, say.
        student: itself.
        teacher: what it learns from.
        inputs: of both models' forward passes.
        labels: targets, `[B, T]`, unshifted, -100 for none.
        weights: of the loss's parts.
        sharded: whether the student's weights are sharded (FSDP2).
        dense: see `chunked_loss`.

    Returns:
        A scalar, fp32.
    """
    per_token = token_loss(weights)
    reference = None
    if weights.distill:
        with teacher.active(student) as base:
            hidden = way_into(base, student, sharded)(**inputs, skip_logits=True, use_cache=False).hidden_states[0]
        reference = hidden, None if base is base_of(student) else base.lm_head

    def loss(head: nn.Linear, hidden: Tensor) -> Tensor:
        teacher_hidden, teacher_head = reference or (None, None)
        return chunked_loss(head, hidden, labels, teacher_hidden, per_token, teacher_head, dense)

    with torch.enable_grad():
        return model(**inputs, loss_from_hidden=loss, use_cache=False).loss
