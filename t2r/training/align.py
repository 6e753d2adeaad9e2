"""Alignment: each Gated Slot Attention layer beside the softmax attention that it came from, on the teacher's input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from t2r.model import T2RForCausalLM
from t2r.model.modeling_t2r import T2RAttention
from t2r.training.adapters import adapters_in, base_of, switched
from t2r.training.objective import delivered
from t2r.training.sharded import gathered, sharded_like
from t2r.training.teachers import Teacher, way_into


def alignment_loss(
    model: T2RForCausalLM | PeftModel,
    teacher: Teacher,
    inputs: dict[str, Tensor],
    counted: Tensor,
    reduce: Callable[[Tensor], Tensor] | None = None,
    sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """How far each converted layer's output is from its softmax attention's, both on the teacher's hidden states.

    A token's error in a layer is the squared distance of the two outputs, relative to the teacher's squared length.
    Gradients stay within the layer and are computed as the teacher's forward pass goes by, so that memory does not
    grow with depth (layer-wise attention transfer, arXiv 2410.10254).

    Args:
        model: the student, with adapters or without.
        teacher: of which it is the converted form.
        inputs: of the teacher's forward pass.
        counted: which tokens count, bool `[B, T]`.
        reduce: averages a vector of gradients over processes, whose gradient hooks this way of computing bypasses.
        sharded: whether the student's weights are sharded (FSDP2).

    Returns:
        The sum over tokens of the mean over layers, a scalar with gradients; and each layer's sum, `[layers]` fp32.
    """
    layers = base_of(model).model.layers
    students = [layer.self_attn for layer in layers]
    # By name: within a forward pass, sharded parameters are others.
    trained = {student: [n for n, p in student.named_parameters() if p.requires_grad] for student in students}
    sums: list[Tensor] = []
    parameters: list[tuple[T2RAttention, str]] = []
    gradients: list[Tensor] = []

    def compare(student, arguments, keywords, expected):
        with torch.enable_grad(), _as_student(student):
            mine = [student.get_parameter(name) for name in trained[student]]
            actual = student.forward(arguments[0].detach(), *arguments[1:], **keywords)
            error = (actual.float() - expected.float()).square().sum(-1)  # [B, T]
            error = error / expected.float().square().sum(-1).clamp_min(1e-12)
            error = torch.where(counted, error, 0).sum()
            gradients.extend(torch.autograd.grad(error / len(hooks), mine))
        parameters.extend((student, name) for name in trained[student])
        sums.append(error.detach())

    hooks = []
    with teacher.active(model) as base:
        for mine, layer in zip(layers, base.model.layers, strict=True):
            if hasattr(mine.self_attn, "f_proj"):

                def hook(_, arguments, keywords, output, mine=mine):
                    with gathered(mine):
                        compare(mine.self_attn, arguments, keywords, output)

                hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        try:
            way_into(base, model, sharded)(**inputs, skip_logits=True, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if reduce:
        flat = reduce(torch.cat([g.flatten() for g in gradients]))
        gradients = [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    by_layer = torch.stack(sums)
    for layer in layers if sharded else ():
        layer.reshard()  # no backward pass comes by here to do it
    leaves = [student.get_parameter(name) for student, name in parameters]
    gradients = [sharded_like(gradient, leaf) for gradient, leaf in zip(gradients, leaves, strict=True)]
    return delivered(by_layer.mean(), leaves, gradients), by_layer


@contextmanager
def _as_student(attention) -> Iterator[None]:
    """One layer as the student has it, adapters on and with slots, though the teacher may be in charge of it."""
    kind = attention.kind
    attention.kind = attention.config.layer_types[attention.layer_idx]
    try:
        with switched(adapters_in(attention), on=True):
            yield
    finally:
        attention.kind = kind
