"""One token of Gated Slot Attention, the state updated in place."""

import torch
from torch import Tensor

from t2r_kernels.state import SlotState


def step(
    q: Tensor,  # [B, HQ, D]
    k: Tensor,  # [B, H, D]
    v: Tensor,  # [B, H, Dv]
    g: Tensor,  # [B, H, M]
    s: Tensor,  # [B, H, M]
    scale: float,
    state: SlotState,
    position: Tensor | None,  # [B], None when no slot is hidden
    lse: Tensor | None = None,  # [B, HQ], to be filled
) -> Tensor:
    """Output `[B, HQ, Dv]` of one step of the recurrence; all tensors share the state's dtype."""
    keys, values = state
    alpha, write = g.exp().unsqueeze(-1), s.unsqueeze(-1)  # [B, H, M, 1]
    keys.mul_(alpha).addcmul_(write, k.unsqueeze(2))  # [B, H, M, D]
    values.mul_(alpha).addcmul_(write, v.unsqueeze(2))  # [B, H, M, Dv]
    logits = scale * q.unflatten(1, (k.shape[1], -1)) @ keys.mT  # [B, H, HQ/H, M]
    if position is not None:
        hidden = torch.arange(g.shape[-1], device=g.device) > position[:, None].clamp_min(0)  # [B, M]
        logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    if lse is not None:
        lse.copy_(logits.logsumexp(-1).flatten(1))
        if position is not None:
            lse.masked_fill_((position < 0)[:, None], float("-inf"))
    return (logits.softmax(-1) @ values).flatten(1, 2)
