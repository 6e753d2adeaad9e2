"""One token a sequence: the state is read once, updated in place, and read by all heads that share it."""

import triton
import triton.language as tl

from t2r_kernels.triton.blocks import FREE, FUSED, TEMPERED, gate_of_logits, one_minus_exp
from t2r_kernels.triton.output import LN_2, LOG2_E


@triton.jit
def update(state, x, keep, strength, row, m0, M: tl.constexpr, WIDTH: tl.constexpr, BS: tl.constexpr,
           BD: tl.constexpr):  # fmt: skip
    """`state ← keep state + strength xᵀ` for slots m0 and on of state `row`, in memory; returns it, `[BS, BD]` fp32."""
    m, d = m0 + tl.arange(0, BS), tl.arange(0, BD)
    pointers = state + row * (M * WIDTH) + (m[:, None] * WIDTH + d[None, :])
    exists = (m < M)[:, None] & (d < WIDTH)[None, :]
    new = tl.load(x + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    now = keep[:, None] * tl.load(pointers, mask=exists, other=0.0) + strength[:, None] * new[None, :]
    tl.store(pointers, now, mask=exists)
    return now


@triton.jit
def step_kernel(
    q, k, v, g, s, slot, gating, positions, keys, values, o, lse, H, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, HIDE: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """One step of the recurrence. One program per sequence and state head, for its GROUP query heads.

    `keys` `[B, H, M, DK]` and `values` `[B, H, M, DV]`, fp32 and contiguous, are overwritten. The softmax runs over BS
    slots at a time, with a running maximum. With LSE, its log-sum-exp too, `[B, 1, HQ]` fp32.
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    a, dk, dv = tl.arange(0, ROWS), tl.arange(0, BK), tl.arange(0, BV)
    head = (h * GROUP + a)[:, None]
    is_head = (a < GROUP)[:, None]
    query = tl.load(q.data + b * q.b + head * q.h + dk[None, :], mask=is_head & (dk < DK)[None, :], other=0.0)
    query = query.to(tl.float32)
    position = M
    if HIDE:
        position = tl.maximum(tl.load(positions + b), 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BV], tl.float32)
    for m0 in range(0, M, BS):
        m = m0 + tl.arange(0, BS)
        x = tl.load(g.data + b * g.b + h * g.h + m, mask=m < M, other=0.0).to(tl.float32)
        if (GATE == FUSED) | (GATE == TEMPERED):
            gate, strength = gate_of_logits(x, tl.load(slot.data + b * slot.b + h * slot.h), m, gating, GATE)
        else:
            gate, strength = x, one_minus_exp(x)
        if GATE == FREE:
            strength = tl.load(s.data + b * s.b + h * s.h + m, mask=m < M, other=0.0).to(tl.float32)
        keep = tl.exp(gate)
        slot_keys = update(keys, k.data + b * k.b + h * k.h, keep, strength, b * H + h, m0, M, DK, BS, BK)
        slot_values = update(values, v.data + b * v.b + h * v.h, keep, strength, b * H + h, m0, M, DV, BS, BV)
        logits = tl.dot(query, tl.trans(slot_keys), input_precision="tf32x3") * (scale * LOG2_E)  # [ROWS, BS]
        logits = tl.where(((m < M) & (m <= position))[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(p, 1)
        out = out * rescale[:, None] + tl.dot(p, slot_values, input_precision="tf32x3")
        top = higher
    if LSE:
        total_log = (top + tl.log2(total)) * LN_2
        if HIDE:
            total_log = tl.where(tl.load(positions + b) < 0, float("-inf"), total_log)
        tl.store(lse.data + b * lse.b + (h * GROUP + a) * lse.h, total_log, mask=a < GROUP)
    out = out * (1.0 / total)[:, None]
    pointers = o.data + b * o.b + head * o.h + dv[None, :]
    tl.store(pointers, out.to(o.data.dtype.element_ty), mask=is_head & (dv < DV)[None, :])
