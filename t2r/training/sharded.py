"""Models whose weights are sharded over processes (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from t2r.model import T2RForCausalLM
from t2r.training.adapters import base_of


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded by now."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's weights, gathered; of one with adapters only these and what trains in full beside them.

    To be called by all processes.
    """
    kept = ("lora_", "modules_to_save") if isinstance(model, PeftModel) else ("",)
    return {
        name: x.full_tensor().cpu() if isinstance(x, DTensor) else x
        for name, x in model.state_dict().items()
        if any(part in name for part in kept)
    }


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Within the context a layer has its weights whole, as it has within its forward pass."""
    if not is_sharded(layer):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.dtype)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def set_policy(accelerator: Accelerator, model: T2RForCausalLM | PeftModel, bf16: bool) -> None:
    """How weights are to be sharded: by layers, gathered in bf16 for bf16, with gradients summed in fp32.

    Raises:
        ValueError: FSDP's first version was asked for.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 is not supported; set fsdp_version: 2, as in examples/accelerate/fsdp2.yaml")
    plugin.transformer_cls_names_to_wrap = [type(base_of(model).model.layers[0]).__name__]  # sharding changes it
    # The loss leaves the model in fp32; accelerate's own policy would round it to bf16.
    dtype = torch.bfloat16 if bf16 else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
