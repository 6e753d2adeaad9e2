"""Alignment: each Gated Slot Attention layer beside the softmax attention that it came from, on the teacher's input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from t2r.model import LINEAR_ATTENTION
from t2r.training.adapters import teacher
from t2r.training.objective import delivered


def alignment_loss(
    model: PeftModel, inputs: dict[str, Tensor], counted: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """How far each converted layer's output is from its softmax attention's, both on the teacher's hidden states.

    A token's error in a layer is the squared distance of the two outputs, relative to the teacher's squared length.
    Gradients stay within the layer and are computed as the teacher's forward pass goes by, so that memory does not
    grow with depth (layer-wise attention transfer, arXiv 2410.10254).

    Args:
        model: from `add_adapters`.
        inputs: of the teacher's forward pass.
        counted: which tokens count, bool `[B, T]`.
        reduce: averages a vector of gradients over processes, whose gradient hooks this way of computing bypasses.

    Returns:
        The sum over tokens of the mean over layers, a scalar with gradients; and each layer's sum, `[layers]` fp32.
    """
    base = model.get_base_model()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    layers = [layer.self_attn for layer in base.model.layers if layer.self_attn.kind == LINEAR_ATTENTION]
    sums: list[Tensor] = []
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []

    def compare(attention, arguments, keywords, expected):
        with torch.enable_grad(), _as_student(attention):
            mine = [p for p in attention.parameters() if id(p) in trained]
            actual = attention.forward(arguments[0].detach(), *arguments[1:], **keywords)
            error = (actual.float() - expected.float()).square().sum(-1)  # [B, T]
            error = error / expected.float().square().sum(-1).clamp_min(1e-12)
            error = error[counted].sum()
            gradients.extend(torch.autograd.grad(error / len(layers), mine))
        parameters.extend(mine)
        sums.append(error.detach())

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        with teacher(model) as base:
            base(**inputs, skip_logits=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if reduce:
        flat = reduce(torch.cat([g.flatten() for g in gradients]))
        gradients = [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    by_layer = torch.stack(sums)
    return delivered(by_layer.mean(), parameters, gradients), by_layer


@contextmanager
def _as_student(attention) -> Iterator[None]:
    """Within the teacher: one layer as the student has it, adapters on and with slots."""
    kind = attention.kind
    tuned = [module for module in attention.modules() if hasattr(module, "enable_adapters")]
    attention.kind = LINEAR_ATTENTION
    for module in tuned:
        module.enable_adapters(True)
    try:
        yield
    finally:
        attention.kind = kind
        for module in tuned:
            module.enable_adapters(False)
