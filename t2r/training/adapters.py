"""What trains: LoRA on the source's projections and in full the parameters that conversion added, or everything."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import peft
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from t2r.model import T2RConfig, T2RForCausalLM, new_parameters
from t2r.model.routing import Router
from t2r.training.config import LoraConfig, OptimConfig, StageConfig, TrainConfig
from t2r.training.lora import fuse_lora

ROUTER = "router"
# Values of PEFT's options that leave the source's weights, which are the teacher, as they are.
HARMLESS = {
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "bias": ("none",),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}
ROUTER_LR = 0.86  # times 1 / hidden_size: 1.5e-3 for SmolLM2-135M, other widths as μP has it (arXiv 2203.03466)


def added_modules(model: T2RForCausalLM | PeftModel) -> list[str]:
    """Names of the modules of an attention layer that conversion added and that may train."""
    added = {name.split(".")[0] for name in new_parameters(model.config)}
    return sorted(added | {ROUTER} if any(f".{ROUTER}." in name for name, _ in model.named_parameters()) else added)


def with_router_lr(config: TrainConfig, network: T2RConfig) -> TrainConfig:
    """A recipe that says how fast routers learn, where it has left that out; 0 where there are none."""
    rate = ROUTER_LR / network.hidden_size if network.start == "routed" else 0.0
    stages = [
        entry | {"optim": entry["optim"] | {"router_lr": rate}}
        if (entry.get("optim") or {}).get("router_lr", rate) is None
        else entry
        for entry in config.stages
    ]
    top = config.optim if config.optim.router_lr is not None else replace(config.optim, router_lr=rate)
    return replace(config, optim=top, stages=stages)


def let_routers_train(model: T2RForCausalLM, stages: Iterable[StageConfig]) -> None:
    """Make routers parameters, if a stage gives them a learning rate.

    Raises:
        ValueError: one does, and the model has no routers.
    """
    if not any(stage.optim.router_lr for stage in stages):
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers and model.config.start != "routed":  # else no layer is converted, which is said elsewhere
        raise ValueError(f"optim.router_lr: the model has no routers (start {model.config.start!r}); leave it out")
    for router in routers:
        router.let_train()


def check_converted(model: T2RForCausalLM) -> None:
    """Raise ValueError if a model has no layer to train."""
    if not model.config.slot_layers:
        raise ValueError("the model has no Gated Slot Attention layer; convert it first: t2r convert MODEL -o OUT")


def add_adapters(model: T2RForCausalLM, lora: LoraConfig) -> PeftModel:
    """Wrap a model for training. Everything trainable is fp32.

    Raises:
        ValueError: the model has no layer to train, no linear layer has one of the target names, or PEFT does not know
            an option.
    """
    check_converted(model)
    # Not the head: the teacher speaks through it too. Not what trains in full already.
    layers = model.model.layers.named_modules()
    linear = {name.split(".")[-1] for name, module in layers if isinstance(module, nn.Linear)}
    added = added_modules(model)
    linear -= set(added)
    unknown = sorted(set(lora.targets) - linear)
    if unknown:
        raise ValueError(
            f"lora.targets: {', '.join(unknown)} cannot have adapters; choose from {', '.join(sorted(linear))}"
        )
    wrapped = peft.get_peft_model(model, _peft_config(lora, added))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse_lora(wrapped)
    return wrapped


def _peft_config(lora: LoraConfig, added: list[str]) -> peft.LoraConfig:
    settings = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "modules_to_save": added}
    settings |= {"task_type": "CAUSAL_LM", "target_modules": list(lora.targets)}
    twice = sorted(settings.keys() & lora.options.keys())
    if twice:
        raise ValueError(f"lora.options: {', '.join(twice)} cannot be set here; the other keys of lora do it")
    for name, value in lora.options.items():
        if value not in HARMLESS.get(name, (value,)):
            known = ", ".join(map(str, HARMLESS[name]))
            raise ValueError(f"lora.options.{name}: {value} changes what is the teacher too; choose from {known}")
    try:
        return peft.LoraConfig(**settings, **lora.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora.options: {' '.join(str(error).split())}") from error


def base_of(model: T2RForCausalLM | PeftModel) -> T2RForCausalLM:
    """The model itself, whether adapters are around it or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters_in(module: nn.Module) -> list[nn.Module]:
    """All adapters in a module, and wrappers of what trains in full beside them."""
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def switched(adapters: list[nn.Module], on: bool) -> Iterator[None]:
    """Within the context, adapters are on or off.

    PEFT's own context looks through the whole model several times over and changes what trains, which takes longer
    than the forward pass of a small model.
    """
    before = [part._disable_adapters for part in adapters]
    try:
        for part in adapters:
            part._disable_adapters = not on
        yield
    finally:
        for part, off in zip(adapters, before, strict=True):
            part._disable_adapters = off


def select_trained(model: T2RForCausalLM | PeftModel, stage: StageConfig) -> None:
    """Let train what a stage trains: all, adapters and added parameters, or these alone; to align, those of attention.
    Routers only train where they have a learning rate.

    Without adapters around the model, all that `trains: gates` does not exclude trains.
    """
    added, converted = added_modules(model), model.config.slot_layers
    adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        is_added = any(f".{module}{'.modules_to_save' if adapted else ''}." in name for module in added)
        wanted = is_added or (stage.trains != "gates" and ("lora_" in name or not adapted))
        aligned = not stage.loss.align or any(f".layers.{i}.self_attn." in f".{name}" for i in converted)
        routes = f".{ROUTER}." not in name or stage.optim.router_lr > 0
        parameter.requires_grad_(wanted and aligned and routes)


def parameter_groups(model: T2RForCausalLM | PeftModel, optim: OptimConfig) -> list[dict]:
    """Adapters (or the source's weights), added parameters and routers, each with its learning rate."""
    added = [f".{module}." for module in added_modules(model)]
    rates = {"weights": optim.lr, "gates": optim.gate_lr, ROUTER: optim.router_lr}
    groups = {kind: {"params": [], "lr": rate, "weight_decay": 0.0} for kind, rate in rates.items()}
    groups["weights"]["weight_decay"] = optim.weight_decay
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_added = any(module in name for module in added)
            kind = ROUTER if f".{ROUTER}." in name else "gates" if is_added else "weights"
            groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
