"""Gated Slot Attention as the equations say it, one token at a time: the judge of every other backend."""

import itertools

import torch
from torch import Tensor

from t2r_kernels.state import SlotState


def naive_gsa(
    q: Tensor,  # [B, T, HQ, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    g: Tensor,  # [B, T, H, M]
    s: Tensor,  # [B, T, H, M]
    scale: float,
    state: SlotState,
    cu_seqlens: Tensor | None,
    hide_unwritten: bool,
    position_offset: Tensor,  # [N]
    output_lse: bool = False,
) -> tuple[Tensor, SlotState, Tensor | None]:
    """The recurrence of arXiv 2409.07146, equations 9 to 11. All tensors share one dtype; see `gsa`."""
    if cu_seqlens is not None:
        return _each_sequence(q, k, v, g, s, scale, state, cu_seqlens, hide_unwritten, position_offset, output_lse)

    B, T, H, M = g.shape
    keys, values = state
    slot = torch.arange(M, device=g.device)
    outputs, sums = [], []
    for t in range(T):
        alpha, write = g[:, t, :, :, None].exp(), s[:, t, :, :, None]  # [B, H, M, 1]
        keys = alpha * keys + write * k[:, t, :, None, :]  # [B, H, M, D]
        values = alpha * values + write * v[:, t, :, None, :]  # [B, H, M, Dv]
        grouped = q[:, t].reshape(B, H, -1, q.shape[-1])  # [B, H, HQ/H, D]
        logits = scale * grouped @ keys.mT  # [B, H, HQ/H, M]
        position = position_offset + t
        if hide_unwritten:
            hidden = slot > position.clamp_min(0)[:, None]  # [B, M]
            logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
        outputs.append((logits.softmax(-1) @ values).flatten(1, 2))  # [B, HQ, Dv]
        if output_lse:
            lse = logits.logsumexp(-1).flatten(1)  # [B, HQ]
            sums.append(lse.masked_fill((position < 0)[:, None], float("-inf")) if hide_unwritten else lse)
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(B, 0, q.shape[2], v.shape[-1])
    if not output_lse:
        return o, SlotState(keys, values), None
    return o, SlotState(keys, values), torch.stack(sums, 1) if sums else q.new_zeros(B, 0, q.shape[2])


def _each_sequence(q, k, v, g, s, scale, state, cu_seqlens, hide_unwritten, position_offset, output_lse):
    bounds = cu_seqlens.tolist()
    outputs, finals, sums = [], [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        o, final, lse = naive_gsa(
            *(x[:, start:end] for x in (q, k, v, g, s)),
            scale,
            SlotState(*(x[n : n + 1] for x in state)),
            None,
            hide_unwritten,
            position_offset[n : n + 1],
            output_lse,
        )
        outputs.append(o)
        finals.append(final)
        sums.append(lse)
    final = SlotState(*(torch.cat(x) for x in zip(*finals, strict=True)))
    return torch.cat(outputs, 1), final, torch.cat(sums, 1) if output_lse else None
