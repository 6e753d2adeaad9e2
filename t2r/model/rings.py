"""The routed start: several rings of slots, and per layer a router that sends each token into one of them.

The first `num_slots` tokens of a document fill the slots in order. From then on each token takes over the slot of its
ring that was written longest ago: what little else will look at passes through a short ring, and what many tokens to
come will look at stays in a long one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_t2r import T2RConfig
from .positions import Positions


class Router(nn.Module):
    """Chooses a ring for each token and key/value head: a linear score against thresholds.

    Fitted when a model is converted. Buffers, since a choice has no gradient.
    """

    def __init__(self, config: T2RConfig):
        super().__init__()
        for name, shape in router_shapes(config).items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]` to the number of each token's ring, `[B, T, H]`."""
        steps = self.thresholds.shape[-1]
        # Thresholds are taken off within the product, so that rounding to bf16 changes no sign.
        beyond = F.linear(x, self.weight.repeat_interleave(steps, 0), -self.thresholds.flatten()) > 0
        return beyond.unflatten(-1, (-1, steps)).sum(-1)


def router_shapes(config: T2RConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a router's buffers: the scores' weight, and for each ring but the first the score that leads there."""
    heads = config.num_key_value_heads
    return {"weight": (heads, config.hidden_size), "thresholds": (heads, len(config.rings_of(0)) - 1)}


def ring_schedule(
    choice: Tensor, positions: Positions, config: T2RConfig, rings: list[int], written: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The slot that each token takes over.

    Args:
        choice: number of each token's ring, `[B, T, H]`.
        positions: of the pass.
        config: of the model.
        rings: sizes of the layer's rings.
        written: tokens that have gone into each ring before this pass, `[B, H, rings]`; None at a sequence's start.

    Returns:
        Slots, int32 `[B, T, H]`, -1 where a place holds no token; and `written` after the pass.
    """
    choice = choice.transpose(1, 2).contiguous()  # [B, H, T]: a GPU sums along the last dimension alone with many hands
    position = positions.ids.unsqueeze(1)  # [B, 1, T]
    routed = position >= config.num_slots
    if positions.padding is not None:
        routed = routed & ~positions.padding.unsqueeze(1)
    slot = position.expand_as(choice)
    counts, first = [], config.num_sinks
    for ring, size in enumerate(rings):
        mine = routed & (choice == ring)  # [B, H, T]
        count = mine.cumsum(-1)  # with this token
        if positions.cu_seqlens is not None:  # less what other documents had: at their first token nothing is routed
            first_token = torch.arange(position.shape[-1], device=position.device) - positions.ids[0]
            count = count - count[..., first_token]
        elif written is not None:
            count = count + written[:, :, ring, None]
        slot = torch.where(mine, first + (count - 1) % size, slot)
        counts.append(count[..., -1])
        first += size
    if positions.padding is not None:
        slot = slot.masked_fill(positions.padding.unsqueeze(1), -1)
    return slot.transpose(1, 2).to(torch.int32), torch.stack(counts, -1)
