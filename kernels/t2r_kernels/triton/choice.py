"""The gradient of the choice of slots, on the GPU: a tile is some tokens and all slots of a head.

A token is in its slot from one write there to the next, so what reaches it is a difference of sums down the slot's
column: up to the write that takes the slot over, less up to its own. Tiles sum within themselves in fp32, what is
before them is added in fp64. No atomics: the same gradient each time.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from t2r_kernels.gate import FLATTEST, Gate
from t2r_kernels.triton.launcher import Launch, run

TILE = 4096  # elements
LONGEST = 64  # tokens of a tile
LEAST_SLOPE = tl.constexpr(FLATTEST)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["T", "N", "H"])
def choice_kernel(
    grads, logits, importance, slots, positions, before, sums, replaced, totals, T, N, H, sinks, write, keep, power,
    sharpness, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program per chunk of C tokens and head.

    `grads` and `logits` are `[B, T, H, M]`, `importance` and `slots` `[B, T, H]`, `positions` `[B, T]`, all contiguous;
    `before` is the place of what each slot holds before a chunk, -1 for nothing, `[B, H, M, N]`. To be filled: for each
    token the `sums` down its slot's column from the chunk's beginning to itself, and the place of the token that it
    `replaced`, `[B, T, H]`; and the chunk's `totals`, `[B, H, M, N]`.
    """
    b, n, h = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N, tl.program_id(1)
    place, m = n * C + tl.arange(0, C), tl.arange(0, BM)
    exists, column = place < T, m < M
    token = (b * T + place) * H + h
    slot = tl.load(slots + token, mask=exists, other=-1)
    position = tl.load(positions + b * T + place, mask=exists, other=0)
    last = tl.load(slots + token - H, mask=exists & (place > n * C), other=-1)  # what the token before took over
    taken = slot[:, None] == m[None, :]  # [C, BM]
    written = tl.where(last[:, None] == m[None, :], place[:, None] - 1, -1)
    aside = ((b * H + h) * M + m) * N + n
    held = tl.load(before + aside, mask=column, other=-1)
    written = tl.maximum(tl.associative_scan(written, 0, _larger), held[None, :])

    chosen = exists & (slot >= 0) & (position >= M)
    first = tl.maximum(place - position + sinks, 0)
    open_ = chosen[:, None] & column[None, :] & (written >= first[:, None])
    of_held = tl.load(importance + (b * T + written) * H + h, mask=open_, other=0.0)
    age = tl.where(open_, tl.log((place[:, None] - written).to(tl.float32)) - of_held, 0.0) * sharpness
    age = tl.where(open_, age, -1e30)
    strengths = tl.where(open_, tl.exp(age - tl.max(age, 1)[:, None]), 0.0)
    strengths = strengths / tl.maximum(tl.sum(strengths, 1), 1e-30)[:, None]

    at = token[:, None] * M + m[None, :]
    inside = exists[:, None] & column[None, :]
    logit = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32) + tl.where(taken, -write, keep)
    sigmoid = tl.sigmoid(logit)
    alpha = sigmoid
    if power != 1.0:
        alpha = tl.exp(tl.log(tl.maximum(sigmoid, 1e-30)) * power)
    slope = tl.maximum(alpha * (1.0 - sigmoid) * power, LEAST_SLOPE)
    by_strength = -tl.load(grads + at, mask=inside, other=0.0).to(tl.float32) / slope
    mean = tl.sum(strengths * by_strength, 1)
    down = tl.cumsum(strengths * (by_strength - mean[:, None]) * sharpness, 0)

    tl.store(sums + token, tl.sum(tl.where(taken, down, 0.0), 1), mask=exists)
    tl.store(replaced + token, tl.max(tl.where(taken, written, -1), 1), mask=exists)
    ends = tl.arange(0, C)[:, None] == C - 1
    tl.store(totals + aside, tl.sum(tl.where(ends, down, 0.0), 0), mask=column)


def gradient_on_gpu(
    grad: Tensor, logits: Tensor, importance: Tensor, gate: Gate, positions: Tensor, num_sinks: int, temperature: float
) -> Tensor:
    """As `t2r_kernels.choice` computes it in plain PyTorch."""
    (B, T, H, M), width = logits.shape, max(16, triton.next_power_of_2(logits.shape[3]))
    C = max(1, min(LONGEST, TILE // width))
    N, device = triton.cdiv(T, C), logits.device
    slots, positions = gate.slot.contiguous(), positions.to(torch.int32).contiguous()
    apart = F.pad(slots, (0, 0, 0, N * C - T), value=-1).view(B, N, C, H).permute(0, 3, 2, 1)  # [B, H, C, N]
    place = torch.arange(N * C, dtype=torch.int32, device=device).view(N, C).T.expand(apart.shape)
    latest = place.new_full((B, H, M + 1, N), -1)  # one column more for places without a token
    latest.scatter_reduce_(2, apart.long().masked_fill(apart < 0, M), place, "amax")
    latest = latest[:, :, :M].cummax(-1).values.int()  # [B, H, M, N]: what slots hold after each chunk
    before = F.pad(latest, (1, 0), value=-1)[..., :-1].contiguous()
    sums, replaced = (torch.empty(B, T, H, dtype=x.dtype, device=device) for x in (importance, slots))
    totals = torch.empty(B, H, M, N, dtype=torch.float32, device=device)
    known = {
        "grads": grad.contiguous(), "logits": logits.contiguous(), "importance": importance.contiguous(),
        "slots": slots, "positions": positions, "before": before, "sums": sums, "replaced": replaced, "totals": totals,
        "T": T, "N": N, "H": H, "sinks": num_sinks, "write": float(gate.write_logit), "keep": float(gate.keep_logit),
        "power": 1 / gate.normalizer, "sharpness": 1 / temperature, "M": M, "BM": width, "C": C,
    }  # fmt: skip
    aligned = tuple(x.data_ptr() % 16 for x in known.values() if isinstance(x, Tensor))
    key = ("choice", M, num_sinks, grad.dtype, logits.dtype, *aligned)
    run([Launch(choice_kernel, (B * N, H, 1), known, {"num_warps": 8})], key, device)

    so_far = totals.double().cumsum(-1)  # [B, H, M, N]
    earlier = F.pad(so_far, (1, 0))[..., :-1]
    chunk = torch.arange(T, device=device)[:, None] // C
    batch, head = torch.arange(B, device=device)[:, None, None], torch.arange(H, device=device)
    holds = slots >= 0
    sums = (sums + earlier[batch, head, slots.clamp_min(0).long(), chunk]).masked_fill(~holds, 0.0)  # [B, T, H] fp64
    found = F.pad(sums, (0, 0, 0, 1))  # one place more, for what there is not
    found.scatter_add_(1, replaced.long().masked_fill(replaced < 0, T), -sums)
    left = latest[..., -1].transpose(1, 2).long()  # [B, M, H]: what slots hold in the end
    found.scatter_add_(1, left.masked_fill(left < 0, T), -so_far[..., -1].transpose(1, 2))
    return found[:, :T].to(importance.dtype)
