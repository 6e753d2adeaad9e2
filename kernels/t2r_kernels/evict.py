"""Which slot each token takes over when slots differ in worth: the one whose token is oldest for its importance."""

from typing import NamedTuple

import torch
from torch import Tensor

from t2r_kernels.api import HAS_TRITON

if HAS_TRITON:
    from t2r_kernels.triton.evict import evict_on_gpu


class Held(NamedTuple):
    """What the slots of each sequence and head hold.

    Attributes:
        rates: how fast each slot's token ages, `[N, H, M]` fp32.
        positions: of those tokens in their sequences, `[N, H, M]` int32.
    """

    rates: Tensor
    positions: Tensor


def evict(
    rates: Tensor,
    positions: Tensor,
    num_slots: int,
    held: Held | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Held | None]:
    """The slot that each token takes over.

    The first `num_slots` tokens of a sequence fill the slots in order. From then on a token takes over the slot where
    `rate × age` is largest, age being the distance in tokens to the token in there: of equal rates that is the oldest,
    one of half the rate stays twice as long, and one of rate 0 stays for good. Not differentiable.

    Args:
        rates: `[B, T, H]` fp32, not negative.
        positions: of each token in its own sequence, `[B, T]` integers; negative where a place holds no token.
        num_slots: M.
        held: what earlier tokens left, of B sequences; left as it is.
        cu_seqlens: `[N + 1]` bounds of packed sequences, which begin at position 0 (B = 1, no `held`).
        longest: tokens of the longest packed sequence, or more.

    Returns:
        Slots, int32 `[B, T, H]`, -1 where a place holds no token; and what the slots then hold, None if packed.
    """
    positions = positions.expand(rates.shape[:2]).to(torch.int32)
    if rates.is_cuda and HAS_TRITON:
        slots, *left = evict_on_gpu(rates.contiguous(), positions.contiguous(), num_slots, held, cu_seqlens)
        return slots, None if cu_seqlens is not None else Held(*left)
    if cu_seqlens is None:
        return _by_token(rates, positions, num_slots, held)
    # Side by side, packed sequences take as many steps as the longest has tokens.
    lengths = cu_seqlens.diff()
    sequence = torch.arange(len(lengths), device=rates.device).repeat_interleave(lengths, output_size=rates.shape[1])
    shape = len(lengths), int(longest or lengths.max())
    apart = rates.new_zeros(*shape, rates.shape[2])
    places = positions.new_full(shape, -1)
    here = sequence, positions[0].long()
    apart[here], places[here] = rates[0], positions[0]
    slots, _ = _by_token(apart, places, num_slots, None)
    return slots[here][None], None


def _by_token(rates: Tensor, positions: Tensor, num_slots: int, held: Held | None) -> tuple[Tensor, Held]:
    """`evict`, one token after the other. Places without a token write into one slot more, which ages backwards."""
    (N, T, H), M = rates.shape, num_slots
    now_rates = rates.new_full((N, H, M + 1), -1.0)
    now_positions = positions.new_zeros(N, H, M + 1)
    if held is not None:
        now_rates[..., :M], now_positions[..., :M] = held
    empty = positions < 0
    rates = rates.masked_fill(empty.unsqueeze(-1), -1.0).unsqueeze(-1)  # [N, T, H, 1]
    filling = positions.masked_fill(empty, M).long()[:, :, None].expand(N, T, H)  # the slot, while there are new ones
    full = (positions >= M)[:, :, None]
    slots = torch.empty(N, T, H, dtype=torch.long, device=rates.device)
    for t in range(T):
        position = positions[:, t, None, None]  # [N, 1, 1]
        oldest = ((position - now_positions) * now_rates).argmax(-1)  # [N, H]
        slots[:, t] = torch.where(full[:, t], oldest, filling[:, t])
        slot = slots[:, t, :, None]
        now_rates.scatter_(2, slot, rates[:, t])
        now_positions.scatter_(2, slot, position.expand(N, H, 1))
    slots = slots.masked_fill(empty.unsqueeze(-1), -1).to(torch.int32)
    return slots, Held(now_rates[..., :M].contiguous(), now_positions[..., :M].contiguous())
