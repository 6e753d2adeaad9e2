"""LoRA's linear layers in fewer passes over memory: scaling and sums happen within matrix products."""

from types import MethodType

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def fuse_lora(model: PeftModel) -> None:
    """Let a model's plain LoRA layers (no dropout, no variant such as DoRA) compute in one piece, in place."""
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain(module):
            module.forward = MethodType(_forward, module)


def _is_plain(layer: LoraLinear) -> bool:
    base, (name,) = layer.base_layer, layer.lora_A
    return (
        type(base) is nn.Linear
        and not layer.fan_in_fan_out
        and not layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )


def _forward(self: LoraLinear, x: Tensor) -> Tensor:
    base = self.base_layer
    if self.disable_adapters or self.merged:
        return base(x)
    (name,) = self.active_adapters
    A, B = self.lora_A[name].weight, self.lora_B[name].weight
    if hasattr(A, "ds_id"):  # DeepSpeed ZeRO-3 gathers weights when their module is called
        return LoraLinear.forward(self, x)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        return _Lora.apply(x.to(dtype), base.weight.to(dtype), base.bias, A, B, self.scaling[name])


class _Lora(torch.autograd.Function):
    """`x Wᵀ + b + scaling · (x Aᵀ) Bᵀ`, with gradients by x, A and B (arXiv 2106.09685, eq. 3)."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        """x `[..., in]`, weight `[out, in]`, A `[r, in]`, B `[out, r]`; returns `[..., out]`."""
        rows = x.flatten(0, -2)  # [n, in]
        A, B = A.to(x.dtype), B.to(x.dtype)
        low = (rows @ A.T).mul_(scaling)  # [n, r]
        out = F.linear(rows, weight, None if bias is None else bias.to(x.dtype)).addmm_(low, B.T)  # [n, out]
        ctx.save_for_backward(x, weight, A, B, low)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, A, B, low = ctx.saved_tensors
        rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)  # [n, in], [n, out]
        by_low = (gradient @ B).mul_(ctx.scaling)  # [n, r]
        wanted = ctx.needs_input_grad
        by_x = (gradient @ weight).addmm_(by_low, A).view_as(x) if wanted[0] else None
        by_A = by_low.T @ rows if wanted[3] else None
        by_B = gradient.T @ low if wanted[4] else None
        return by_x, None, None, by_A, by_B, None
