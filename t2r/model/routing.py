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
TEMPERATURE = 0.3  # of the choice between slots that gradients see, see `t2r_kernels.straight_through`


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
