"""What a run would do, without doing it: `t2r train --dry-run`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Group
from rich.table import Table
from transformers import AutoConfig

from t2r.evaluation.loading import UNLOADABLE, locate
from t2r.model import HYBRID_ATTENTION, SLOT_ATTENTION, T2RConfig, T2RForCausalLM
from t2r.training.adapters import add_adapters, added_modules, let_routers_train, select_trained, with_router_lr
from t2r.training.config import StageConfig, TrainConfig
from t2r.training.documents import is_local, sources_of
from t2r.training.flops import matrix_parameters
from t2r.training.fused import wants_liger
from t2r.training.objective import tokens_at_once
from t2r.training.recipe import dtype_of, stages_of
from t2r.training.sharded import launched_sharded
from t2r.training.stages import Stage, plan_stages
from t2r.training.teachers import describe_teacher, needs_separate_teacher

TRAINED_BYTES = 16  # fp32: the parameter, its gradient and AdamW's two moments


@dataclass(frozen=True)
class StagePlan:
    """A stage: its lengths, and what it takes.

    Attributes:
        stage: with its steps.
        trained_parameters: how many numbers it changes.
        memory: estimated peak of one process, by what takes it, in bytes.
    """

    stage: Stage
    trained_parameters: int
    memory: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        stages: in order.
        processes: how many.
        teacher: which one, in words.
        frozen_parameters: numbers that stay as they are.
        dtype: of these.
        disk: bytes that checkpoints and results take at most.
        missing: data files that are not there.
    """

    stages: list[StagePlan]
    processes: int
    teacher: str
    frozen_parameters: int
    dtype: str
    disk: int
    missing: list[str]

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            "processes": self.processes,
            "frozen_parameters": self.frozen_parameters,
            "dtype": self.dtype,
            "teacher": self.teacher,
            "disk_bytes": self.disk,
            "missing_files": self.missing,
            "stages": [
                {
                    "stage": plan.stage.name,
                    "steps": plan.stage.steps,
                    "tokens": plan.stage.steps * plan.stage.tokens_per_step,
                    "tokens_per_step": plan.stage.tokens_per_step,
                    "sequence_length": plan.stage.config.sequence_length,
                    "trains": plan.stage.config.trains,
                    "trained_parameters": plan.trained_parameters,
                    "memory_bytes": sum(plan.memory.values()),
                    "memory": plan.memory,
                }
                for plan in self.stages
            ],
        }


def plan_run(config: TrainConfig, processes: int = 1, on_cuda: bool | None = None, sharded: bool | None = None) -> Plan:
    """Plan a run from its recipe and the model's configuration; no weight is loaded and no data read.

    Args:
        config: from `load_config`.
        processes: how many will train.
        on_cuda: whether they have GPUs; None for as here.
        sharded: whether weights are sharded over them (FSDP2); None for as accelerate was launched.

    Raises:
        ValueError: there is no such model, it is not converted, or a LoRA target does not exist.
    """
    on_cuda = torch.cuda.is_available() if on_cuda is None else on_cuda
    sharded = launched_sharded() if sharded is None else sharded
    dtype, liger = dtype_of(config, on_cuda), wants_liger(config, on_cuda)
    network = network_of(config.model)
    config = with_router_lr(config, network)
    with torch.device("meta"):
        model = T2RForCausalLM(network)
        let_routers_train(model, stages_of(config))
        own = sum(p.numel() for p in model.parameters())
        model = model if needs_separate_teacher(config) else add_adapters(model, config.lora)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad or needs_separate_teacher(config))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    stages, separate = [], needs_separate_teacher(config)
    for stage in plan_stages(config, processes):
        select_trained(model, stage.config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        half = 2 if dtype == "bfloat16" else 4
        # Autocast keeps copies of fp32 weights for the length of a pass; DDP copies gradients to buckets.
        each = TRAINED_BYTES + (2 if half == 2 and stage.config.trains == "full" else 0) + (4 if processes > 1 else 0)
        activations, loss = _activations(network, stage.config, config, dtype, liger)
        memory = {
            "frozen weights": _teacher(network, own, config.teacher_bits, half) if separate else frozen * half,
            "trained": (trainable - trained) * 4 + trained * each,
            "activations": activations,
            "loss": loss,
        }
        if sharded:
            memory = _sharded(memory, network, processes, half, own * 4 if separate else 0)
        stages.append(StagePlan(stage, trained, memory))
    disk = disk_needed(config, model, [plan.stage for plan in stages], sharded)
    missing = [s.path for s in sources_of(config.data) if is_local(s) and not Path(s.path).is_file()]
    return Plan(stages, processes, describe_teacher(config), frozen, dtype, disk, missing)


def disk_needed(config: TrainConfig, model: T2RForCausalLM | PeftModel, stages: list[Stage], sharded: bool) -> int:
    """Bytes that a run's checkpoints and result take at most.

    A checkpoint holds what may train and the optimizer of what does (and the latter itself once more, of sharded
    weights); one of each earlier stage stays, and one is written beside the others.
    """
    largest = 0
    for stage in stages:
        select_trained(model, stage.config)
        largest = max(largest, sum(p.numel() for p in model.parameters() if p.requires_grad))
    added = (f".{module}." for module in added_modules(model))
    parts = ("lora_", *added) if isinstance(model, PeftModel) else ("",)
    kept = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))
    each = 4 * kept + (12 if sharded else 8) * largest
    return 4 * kept + (config.save_limit + len(stages)) * each


def network_of(source: str) -> T2RConfig:
    """A converted model's configuration.

    Raises:
        ValueError: it cannot be read, or the model is not converted.
    """
    location, options = locate(source)
    try:
        network = AutoConfig.from_pretrained(location, **options)
    except UNLOADABLE as error:
        raise ValueError(f"{source}: its configuration cannot be read: {error}") from error
    if not isinstance(network, T2RConfig):
        raise ValueError(
            f"{source}: a {network.model_type} model; convert it first (t2r convert {source} -o OUT) and set model: OUT"
        )
    return network


def _teacher(network: T2RConfig, numbers: int, bits: int | None, half: int) -> int:
    """Bytes of a separate teacher; of a quantised one the layers' projections have so many bits."""
    attention, mlp, _ = matrix_parameters(network)
    quantised = attention + mlp if bits else 0
    return (numbers - quantised) * half + quantised * (bits or 0) // 8


def _sharded(memory: dict[str, int], network: T2RConfig, processes: int, half: int, student: int) -> dict[str, int]:
    """What becomes of a stage's memory when weights, gradients and optimizer are sharded.

    Two layers and the head are gathered at a time. Before that, each process holds the whole model (of `student`
    bytes, if it is one beside its teacher, which stays whole) beside its shards, and it may be then that memory peaks.
    """
    attention, mlp, head = matrix_parameters(network)
    shared = ("trained",) if student else ("frozen weights", "trained")
    parts = memory | {name: memory[name] // processes for name in shared}
    parts["gathered"] = half * (2 * (attention + mlp) // len(network.layer_types) + 2 * head)
    whole = memory["frozen weights"] + student
    shards = student // processes if student else parts["frozen weights"] + parts["trained"]
    parts["sharding"] = max(0, whole + shards - sum(parts.values()))
    return parts


def _activations(
    network: T2RConfig, stage: StageConfig, config: TrainConfig, dtype: str, liger: bool
) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and that the loss takes beside them."""
    n, half = stage.batch_size * stage.sequence_length, 2 if dtype == "bfloat16" else 4
    routers = stage.optim.router_lr > 0
    layers = [saved_bytes(network, layer, half, liger, routers) for layer in range(network.num_hidden_layers)]
    logits = tokens_at_once(network.vocab_size) * network.vocab_size * 4 * (6 if stage.loss.distill else 4)
    states = n * network.hidden_size * (half + 4) * 2
    if stage.loss.align:
        return n * max(layers), 0
    if config.gradient_checkpointing:
        return n * (len(layers) * network.hidden_size * half + max(layers)), logits + states
    return n * sum(layers), logits + states


def saved_bytes(network: T2RConfig, layer: int, half: int, liger: bool = False, routers: bool = False) -> int:
    """Bytes a token that one decoder layer keeps for the backward pass, with adapters on all its projections.

    Args:
        network: the model's configuration.
        layer: its number.
        half: bytes of a number in the dtype that the layers compute in.
        liger: whether liger-kernel computes norms and SwiGLU.
        routers: whether routers train.
    """
    hidden, inner, kind = network.hidden_size, network.intermediate_size, network.layer_types[layer]
    queries = network.num_attention_heads * network.head_dim
    keys = network.num_key_value_heads * network.head_dim
    norms = 2 * hidden * (half if liger else 4)  # by themselves they compute in fp32
    attention = half * (hidden + 2 * queries + 2 * keys)  # projections' input, q, k, v, and o_proj's input
    if kind in SLOT_ATTENTION:
        attention += half * (1 + routers) * sum(network.slots_of(layer))
        attention += 4 * hidden if routers and half == 2 else 0  # routers compute in fp32
    if kind == HYBRID_ATTENTION:  # in fp32: logits and softmax, queries and outputs; keys and values, twice
        window = 2 * network.hybrid_window  # keys that a block of queries meets
        attention += 4 * (2 * network.num_attention_heads * window + 2 * queries + 4 * keys)
    mlp = half * (hidden + (3 if liger else 4) * inner)  # input, gate, its SiLU, up, and down_proj's input
    return norms + attention + mlp


def render(plan: Plan) -> Group:
    """The plan as tables."""
    stages = Table("stage", "steps", "tokens", "a step", "sequence", "trains", "parameters", title="Stages")
    memory = Table("stage", *plan.stages[0].memory, "in all", title=f"Memory a process, estimated ({plan.dtype})")
    for item in plan.stages:
        stage = item.stage
        stages.add_row(
            stage.name, f"{stage.steps:,}", f"{stage.steps * stage.tokens_per_step:,}", f"{stage.tokens_per_step:,}",
            f"{stage.config.sequence_length:,}", stage.config.trains, f"{item.trained_parameters:,}",
        )  # fmt: skip
        values = [*item.memory.values(), sum(item.memory.values())]
        memory.add_row(stage.name, *(f"{value / 2**30:,.2f} GiB" for value in values))
    rest = Table(show_header=False)
    rest.add_row("teacher", plan.teacher)
    rest.add_row("frozen parameters", f"{plan.frozen_parameters:,}")
    rest.add_row("processes", str(plan.processes))
    rest.add_row("disk, at most", f"{plan.disk / 2**30:,.2f} GiB")
    if plan.missing:
        rest.add_row("data files that are not there", ", ".join(plan.missing))
    return Group(stages, memory, rest)
