"""Ways to start a Gated Slot Attention layer: what surrounds the operator, and the gates.

`window`: each token takes over one slot of a fixed schedule and everything else is kept, so that a layer begins as
softmax attention over the first `num_sinks` tokens and the last `num_slots - num_sinks`. `routed`: each token takes
over the slot whose token is oldest for its importance, see `t2r.model.routing`. `paper`: as published (arXiv
2409.07146, section 3.3): Swish on q, k and v, gates from a tempered sigmoid, a norm on the output.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t2r_kernels import Gate

from .configuration_t2r import T2RConfig
from .positions import Positions
from .routing import router_shapes


@dataclass(frozen=True)
class Start:
    """What surrounds the operator.

    Attributes:
        rope: rotate q and k by position.
        swish: Swish on q, k, v and on the output.
        scale: factor on the slot logits; None for `head_dim ** -0.5`.
        hide_unwritten: keep slots out of the softmax until their first token has come.
        gate_bias: whether the gate projection has a bias.
        gate_std: standard deviation of the gate projection's weight at the start.
        output_norm: RMSNorm before the output projection.
        routed: whether each layer chooses its slots by itself, with a router.
    """

    rope: bool
    swish: bool
    scale: float | None
    hide_unwritten: bool
    gate_bias: bool
    gate_std: float
    output_norm: bool
    routed: bool = False


STARTS = {
    "window": Start(
        rope=True,
        swish=False,
        scale=None,
        hide_unwritten=True,
        gate_bias=True,
        gate_std=0.0,
        output_norm=False,
    ),
    "paper": Start(
        rope=False,
        swish=True,
        scale=1.0,
        hide_unwritten=False,
        gate_bias=False,
        gate_std=0.02,
        output_norm=True,
    ),
}


STARTS["routed"] = replace(STARTS["window"], routed=True)


def new_parameters(config: T2RConfig, layer: int = 0) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Parameters that a Gated Slot Attention layer has and its source has not.

    Args:
        config: of the model.
        layer: its number; layers differ in slots alone.

    Returns:
        For each name below `self_attn`: its shape, and the mean and standard deviation it starts with.
    """
    start = STARTS[config.start]
    gates = sum(config.slots_of(layer))
    parameters = {"f_proj.weight": ((gates, config.hidden_size), 0.0, start.gate_std)}
    if start.gate_bias:
        parameters["f_proj.bias"] = ((gates,), 0.0, 0.0)
    if start.output_norm:
        parameters["g_norm.weight"] = ((config.num_attention_heads * config.head_dim,), 1.0, 0.0)
    return parameters


def new_tensors(config: T2RConfig, layer: int = 0) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """As `new_parameters`, and what such a layer has beside them that does not train."""
    fitted = router_shapes(config) if STARTS[config.start].routed else {}
    return new_parameters(config, layer) | {f"router.{name}": (shape, 0.0, 0.0) for name, shape in fitted.items()}


def window_schedule(position: Tensor, num_slots: int, num_sinks: int) -> Tensor:
    """The slot that the token at each position takes over: the sinks once, then the others in a ring.

    Args:
        position: position of each token in its own document, any integer shape.
        num_slots: slots in all.
        num_sinks: slots outside the ring.

    Returns:
        int32, `position`'s shape.
    """
    ring = num_sinks + (position - num_sinks) % (num_slots - num_sinks)
    return torch.where(position < num_sinks, position, ring).to(torch.int32)


def slot_schedule(positions: Positions, config: T2RConfig, num_slots: int | None = None) -> Tensor:
    """The slot that each token takes over: `[B, T]` int32, -1 where a place holds no token. Not of routed layers.

    Args:
        positions: of the pass.
        config: of the model.
        num_slots: of the heads; None for the configuration's.
    """
    if config.start == "window":
        slot = window_schedule(positions.ids, num_slots or config.num_slots, config.num_sinks)
    else:
        slot = torch.zeros_like(positions.ids, dtype=torch.int32)
    return slot if positions.padding is None else slot.masked_fill(positions.padding, -1)


def gate_of(slot: Tensor, config: T2RConfig) -> Gate:
    """How a layer's gate logits become log gates.

    Args:
        slot: that each token takes over, `[B, T, H]` int32.
        config: the model's configuration.
    """
    if config.start == "paper":
        return Gate(slot, normalizer=config.gate_logit_normalizer)
    return Gate(slot, config.gate_write_logit, config.gate_keep_logit)
