"""Which slot each token takes over when slots differ in worth: the one whose token is oldest for its importance."""

from collections.abc import Sequence
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
    heads = tuple(range(rates.shape[2]))
    return evict_groups(rates, positions, [(num_slots, heads)], [held] if held else [], cu_seqlens, longest)[0]


def evict_groups(
    rates: Tensor,
    positions: Tensor,
    groups: Sequence[tuple[int, Sequence[int]]],
    held: Sequence[Held] = (),
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> list[tuple[Tensor, Held | None]]:
    """`evict` for heads that differ in their number of slots.

    Args:
        rates: as for `evict`, of all heads.
        positions: as for `evict`.
        groups: numbers of slots, each with the heads that have as many. Every head is in one.
        held: what earlier tokens left in each group's slots; nothing at a sequence's start.
        cu_seqlens: as for `evict`.
        longest: as for `evict`.

    Returns:
        For each group, what `evict` returns of its heads.
    """
    positions = positions.expand(rates.shape[:2]).to(torch.int32)
    before = held or [None] * len(groups)
    if rates.is_cuda and HAS_TRITON:
        positions, found = positions.contiguous(), []
        for (num_slots, heads), each in zip(groups, before, strict=True):
            some = rates if len(groups) == 1 else torch.stack([rates[..., head] for head in heads], -1)
            slots, *left = evict_on_gpu(some.contiguous(), positions, num_slots, each, cu_seqlens)
            found.append((slots, None if cu_seqlens is not None else Held(*left)))
        return found
    # One loop over tokens for all groups.
    slots, left = _on_cpu(rates, positions, groups, before, cu_seqlens, longest)
    parts = [(list(heads), num_slots) for num_slots, heads in groups]
    return [
        (slots[..., heads], left and Held(*(x[:, heads, :num_slots].contiguous() for x in left)))
        for heads, num_slots in parts
    ]


def _on_cpu(rates, positions, groups, held, cu_seqlens, longest) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    if cu_seqlens is None:
        return _by_token(rates, positions, groups, held)
    # Side by side, packed sequences take as many steps as the longest has tokens.
    lengths = cu_seqlens.diff()
    sequence = torch.arange(len(lengths), device=rates.device).repeat_interleave(lengths, output_size=rates.shape[1])
    shape = len(lengths), int(longest or lengths.max())
    apart = rates.new_zeros(*shape, rates.shape[2])
    places = positions.new_full(shape, -1)
    here = sequence, positions[0].long()
    apart[here], places[here] = rates[0], positions[0]
    slots, _ = _by_token(apart, places, groups, held)
    return slots[here][None], None


def _by_token(rates, positions, groups, held) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`evict_groups`, one token after the other: slots, and rates and positions of the most slots that a head has.

    Places without a token write into one slot more, which ages backwards, as do the slots that a head has not.
    """
    (N, T, H), M = rates.shape, max(num_slots for num_slots, _ in groups)
    now_rates = rates.new_full((N, H, M + 1), -1.0)
    now_positions = positions.new_zeros(N, H, M + 1)
    counts = positions.new_empty(H)
    for (num_slots, heads), each in zip(groups, held, strict=True):
        counts[list(heads)] = num_slots
        if each is not None:
            now_rates[:, list(heads), :num_slots], now_positions[:, list(heads), :num_slots] = each
    empty = positions < 0
    rates = rates.masked_fill(empty.unsqueeze(-1), -1.0).unsqueeze(-1)  # [N, T, H, 1]
    filling = positions.masked_fill(empty, M).long()[:, :, None].expand(N, T, H)  # the slot, while there are new ones
    full = positions.unsqueeze(-1) >= counts  # [N, T, H]
    slots = torch.empty(N, T, H, dtype=torch.long, device=rates.device)
    for t in range(T):
        position = positions[:, t, None, None]  # [N, 1, 1]
        oldest = ((position - now_positions) * now_rates).argmax(-1)  # [N, H]
        slots[:, t] = torch.where(full[:, t], oldest, filling[:, t])
        slot = slots[:, t, :, None]
        now_rates.scatter_(2, slot, rates[:, t])
        now_positions.scatter_(2, slot, position.expand(N, H, 1))
    slots = slots.masked_fill(empty.unsqueeze(-1), -1).to(torch.int32)
    return slots, (now_rates, now_positions)
