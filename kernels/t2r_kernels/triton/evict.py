"""Slots by age and rate, on the GPU: one warp a sequence and head, which goes from token to token."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from t2r_kernels.triton.launcher import Launch, run

AHEAD = 32  # tokens that are loaded at a time, so that a step waits for no memory


@triton.jit(do_not_specialize=["T", "H"])
def evict_kernel(
    rates, positions, slots, bounds, held_rates, held_positions, left_rates, left_positions, T, H,
    M: tl.constexpr, BM: tl.constexpr, AHEAD: tl.constexpr, PACKED: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head.

    `rates` and `slots` are `[B, T, H]`, `positions` `[B, T]`, all contiguous; what the slots hold before and
    afterwards is `[B, H, M]`. Nothing is left of packed sequences.
    """
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    start, length = n * T, T
    if PACKED:
        start = tl.load(bounds + n).to(tl.int64)
        length = (tl.load(bounds + n + 1) - start).to(tl.int32)
    m, lane = tl.arange(0, BM), tl.arange(0, AHEAD)
    rate = tl.where(m < M, 0.0, -1.0)  # slots that there are not age backwards
    position = tl.zeros([BM], tl.int32)
    row = (n * H + h) * M + m
    if RESUMED:
        rate = tl.load(held_rates + row, mask=m < M, other=-1.0)
        position = tl.load(held_positions + row, mask=m < M, other=0)
    for t0 in range(0, length, AHEAD):
        found = tl.full([AHEAD], -1, tl.int32)
        for j in tl.static_range(AHEAD):
            exists = t0 + j < length
            p = tl.load(positions + start + t0 + j, mask=exists, other=-1)
            r = tl.load(rates + (start + t0 + j) * H + h, mask=exists, other=0.0)
            # Numbers that are not negative compare as their bits do, and integers reduce in one instruction.
            worn = ((p - position).to(tl.float32) * rate).to(tl.int32, bitcast=True)
            oldest = tl.min(tl.where(worn == tl.max(worn, 0), m, BM), 0)
            slot = tl.where(p >= M, oldest, p)
            position = tl.where(m == slot, p, position)
            rate = tl.where(m == slot, r, rate)
            found = tl.where(lane == j, slot, found)
        tl.store(slots + (start + t0 + lane) * H + h, found, mask=t0 + lane < length)
    if not PACKED:
        tl.store(left_rates + row, rate, mask=m < M)
        tl.store(left_positions + row, position, mask=m < M)


def _evict(
    rates: Tensor,  # [B, T, H] fp32, contiguous
    positions: Tensor,  # [B, T] int32, contiguous
    num_slots: int,
    held_rates: Tensor | None,  # [B, H, M]
    held_positions: Tensor | None,
    cu_seqlens: Tensor | None,  # [N + 1]
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots `[B, T, H]` int32, and what they hold afterwards (empty if packed)."""
    (B, T, H), packed = rates.shape, cu_seqlens is not None
    slots = torch.empty(B, T, H, dtype=torch.int32, device=rates.device)
    left = _left(rates, positions, num_slots, packed)
    n = len(cu_seqlens) - 1 if packed else B
    if n and T:
        known = {
            "rates": rates, "positions": positions, "slots": slots, "bounds": cu_seqlens, "held_rates": held_rates,
            "held_positions": held_positions, "left_rates": left[0], "left_positions": left[1], "T": T, "H": H,
            "M": num_slots, "BM": max(32, triton.next_power_of_2(num_slots)), "AHEAD": AHEAD if T > 1 else 1,
            "PACKED": packed, "RESUMED": held_rates is not None,
        }  # fmt: skip
        tensors = rates, positions, slots, cu_seqlens, held_rates, held_positions
        key = ("evict", num_slots, T > 1, *(None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors))
        run([Launch(evict_kernel, (n * H, 1, 1), known, {"num_warps": 1})], key, rates.device)
    return slots, *left


def _left(rates: Tensor, positions: Tensor, num_slots: int, packed: bool) -> tuple[Tensor, Tensor]:
    shape = (0,) if packed else (rates.shape[0], rates.shape[2], num_slots)
    return rates.new_empty(shape), positions.new_empty(shape)


evict_op = custom_op("t2r::evict", _evict, mutates_args=())


@evict_op.register_fake
def _(rates, positions, num_slots, held_rates, held_positions, cu_seqlens):  # noqa: ARG001
    left = _left(rates, positions, num_slots, cu_seqlens is not None)
    return torch.empty_like(rates, dtype=torch.int32), *left


@torch.no_grad()
def evict_on_gpu(
    rates: Tensor, positions: Tensor, num_slots: int, held: tuple[Tensor, Tensor] | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`t2r_kernels.evict`, by the shortest way. All tensors are contiguous."""
    held_rates, held_positions = held or (None, None)
    op = evict_op if torch.compiler.is_compiling() else _evict
    return op(rates, positions, num_slots, held_rates, held_positions, cu_seqlens)
