"""The routed start: per layer a router that foresees how much each token will be needed.

The first `num_slots` tokens of a document fill the slots in order. From then on each token takes over the slot whose
token is oldest for its importance: what little else will look at soon makes room, and what many tokens to come will
look at stays for long. With all tokens equal, that is the ring of the window start.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2r_kernels import Held, evict_groups

from .configuration_t2r import T2RConfig
from .heads import HeadGroup
from .positions import Positions

MOST = 30.0  # the largest log importance, either way
TEMPERATURE = 0.1  # of the choice between slots that gradients see


class Router(nn.Module):
    """Foresees the importance of each token to each key/value head: linear in the layer's input.

    Fitted when a model is converted, and held in buffers unless it is to train.
    """

    def __init__(self, config: T2RConfig):
        super().__init__()
        for name, shape in router_shapes(config).items():
            self.register_buffer(name, torch.zeros(shape))

    def let_train(self) -> None:
        """Make weight and bias parameters."""
        for name in list(self._buffers):
            self.register_parameter(name, nn.Parameter(self._buffers.pop(name)))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]`, which has no gradient, to the log of each token's importance, `[B, T, H]` fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.detach().to(self.weight.dtype), self.weight, self.bias).float().clamp(-MOST, MOST)


def router_shapes(config: T2RConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a router's buffers."""
    heads = config.num_key_value_heads
    return {"weight": (heads, config.hidden_size), "bias": (heads,)}


def routed_schedule(
    importance: Tensor,
    positions: Positions,
    config: T2RConfig,
    groups: Sequence[HeadGroup],
    held: Sequence[Held] = (),
) -> list[tuple[Tensor, Held | None]]:
    """The slot that each token takes over.

    Args:
        importance: the log of each token's, `[B, T, H]` fp32.
        positions: of the pass.
        config: of the model.
        groups: the layer's heads, by their slots.
        held: what each group's slots hold before this pass; nothing at a sequence's start.

    Returns:
        For each group slots, int32 `[B, T, heads]`, -1 where a place holds no token; and what slots hold afterwards,
        None if packed.
    """
    importance, sinks = importance.detach(), (positions.ids < config.num_sinks).unsqueeze(-1)
    places = positions.ids if positions.padding is None else positions.ids.masked_fill(positions.padding, -1)
    rates = importance.neg().exp().masked_fill(sinks, 0.0)  # sinks do not age
    return evict_groups(rates, places, groups, held, positions.cu_seqlens, positions.longest)


def straight_through(
    logits: Tensor, importance: Tensor, slot: Tensor, positions: Positions, config: T2RConfig
) -> Tensor:
    """Zeros to add to gate logits, by which their gradients reach the router.

    A token takes over one slot, and to take another is no small step: the choice has no gradient. In the backward pass
    it is as if the token had been written into every slot, as strongly as the softmax of `log(rate × age)` over
    `TEMPERATURE` says (a straight-through estimator, arXiv 1308.3432).

    Args:
        logits: of the gates, `[B, T, heads, M]`.
        importance: the log of each token's, `[B, T, heads]`.
        slot: that each token takes over, `[B, T, heads]`, of a pass that begins with empty slots.
        positions: of the pass.
        config: of the model.

    Returns:
        `[B, T, heads, M]` in the logits' dtype.
    """
    taken = slot.unsqueeze(-1) == torch.arange(logits.shape[-1], device=slot.device)  # [B, T, heads, M]
    strengths = _strengths(importance, taken, positions, config)
    base = torch.where(taken, -config.gate_write_logit, config.gate_keep_logit)
    alpha = torch.sigmoid(logits.detach().float() + base)
    slope = (alpha * (1 - alpha)).clamp_min(1e-6)  # of a gate by its logit
    return ((strengths.detach() - strengths) / slope).to(logits.dtype)


def _strengths(importance: Tensor, taken: Tensor, positions: Positions, config: T2RConfig) -> Tensor:
    """How strongly each token would be written into each slot, `[B, T, heads, M]`: 1 - α of the gates."""
    place = torch.arange(taken.shape[1], device=taken.device)[:, None, None]  # [T, 1, 1]
    written = torch.where(taken, place, -1).cummax(1).values
    written = F.pad(written, (0, 0, 0, 0, 1, 0), value=-1)[:, :-1]  # the place of what each slot holds as a token comes
    first = place - positions.ids[:, :, None, None]  # of the token's document
    of_held = importance.unsqueeze(-1).expand(written.shape).gather(1, written.clamp_min(0))
    age = (place - written).clamp_min(1).log() - of_held  # log(rate * age)
    age = age.masked_fill(written < first + config.num_sinks, float("-inf"))  # sinks stay; so does what is not there
    full = positions.ids[:, :, None, None] >= taken.shape[-1]
    soft = (age.masked_fill(~full, 0.0) / TEMPERATURE).softmax(-1)
    return torch.where(full, soft, taken.to(soft.dtype))  # new slots come first
