"""Faster layers: liger-kernel's fused norms, rotary embedding and SwiGLU, or layers compiled by torch."""

from importlib.util import find_spec
from types import MethodType

import torch
from peft import PeftModel
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from t2r.model import T2RForCausalLM
from t2r.model.modeling_t2r import T2RAttention, rotate
from t2r.training.adapters import base_of
from t2r.training.config import TrainConfig


def wants_liger(config: TrainConfig, on_cuda: bool) -> bool:
    """Whether liger-kernel's layers are to be used: as the recipe says, or where they are to be had and serve.

    Raises:
        ValueError: they are asked for, and liger-kernel is not installed, or there is no GPU for it.
    """
    installed = find_spec("liger_kernel") is not None
    if config.use_liger_kernel is None:
        return installed and on_cuda and not config.torch_compile
    if config.use_liger_kernel and not installed:
        raise ValueError("use_liger_kernel: true needs liger-kernel; install it (pip install liger-kernel)")
    if config.use_liger_kernel and not on_cuda:
        raise ValueError("use_liger_kernel: true needs a GPU; leave it unset")
    return config.use_liger_kernel


def use_liger(model: T2RForCausalLM | PeftModel) -> None:
    """Let liger-kernel compute norms, rotary embedding and SwiGLU of a model, in place."""
    for module in base_of(model).modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(_norm, module)
        elif isinstance(module, LlamaMLP) and module.config.hidden_act in ("silu", "swish"):
            module.forward = MethodType(_swiglu, module)
        elif isinstance(module, T2RAttention):
            module.rotate = _rotate


def compile_layers(model: T2RForCausalLM | PeftModel, backend: str = "inductor") -> None:
    """Compile a model's decoder layers, each by itself, so that one compilation serves all that are alike."""
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)  # student, teacher, evaluation
    for layer in base_of(model).model.layers:
        layer.compile(backend=backend)


def _norm(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _swiglu(self: LlamaMLP, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_rope

    if cos.shape[-1] < q.shape[-1]:  # a part of each head
        return rotate(q, k, cos, sin)
    q, k = liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)
