"""Models whose weights are sharded over processes (FSDP2)."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from t2r.model import T2RForCausalLM
from t2r.training.adapters import base_of
from t2r.training.stages import Stage


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded by now."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def launched_sharded() -> bool:
    """Whether accelerate was launched to shard weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_zero3(stages: list[Stage]) -> None:
    """Refuse what DeepSpeed ZeRO-3 does not do: to align, and to take up for a second stage what it has sharded.

    Raises:
        ValueError: accelerate was launched with ZeRO-3, and there is more than one stage, or one that aligns.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    file, zero = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"), None
    if file == "none":
        zero = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    else:
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage")
    if zero == 3 and (len(stages) > 1 or stages[0].config.loss.align):
        raise ValueError(
            "DeepSpeed ZeRO-3 takes runs of one stage that does not align; use FSDP2 (examples/accelerate/fsdp2.yaml)"
        )


def check_shards(model: nn.Module, processes: int) -> None:
    """Refuse parameters of which a process would have nothing: accelerate mixes these up when a second stage begins.

    Raises:
        ValueError: there are such parameters.
    """
    rows = {len(p) for p in model.parameters() if p.ndim}
    short = sorted(n for n in rows if -(-n // processes) * (processes - 1) >= n)
    if short:
        raise ValueError(
            f"weights of {', '.join(map(str, short))} rows cannot be shared out to {processes} processes in several "
            "stages; choose lora.r as a multiple of the processes, optim.router_lr: 0 (a router has a row for each "
            "key/value head), or stages as runs of their own"
        )


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """All of a model's weights, gathered; of one with adapters only these and what trains in full beside them.

    To be called by all processes; those that do not `keep` them get nothing.
    """
    kept = ("lora_", "modules_to_save") if isinstance(model, PeftModel) else ("",)
    state = {}
    for name, x in model.state_dict().items():
        if any(part in name for part in kept):
            x = x.full_tensor() if isinstance(x, DTensor) else x
            if keep:
                state[name] = x.cpu()
    return state


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
