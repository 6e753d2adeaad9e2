"""Chunk states: what each chunk writes, and the scan that turns it into the state before (or the gradient after) it."""

import triton
import triton.language as tl

from t2r_kernels.triton.blocks import (
    MANY_BANDS,
    ONE_BAND,
    cumulative,
    last_row,
    load_gates,
    load_tile,
    locate,
    operand,
    state_tile,
    tile,
)


# One compiled kernel for any number of sequences: the key that it is found by does not hold it (`launcher.py`).
@triton.jit(do_not_specialize=["N", "NT"])
def chunk_table_kernel(cu_seqlens, table, bounds, N, NT, C: tl.constexpr, BLOCK: tl.constexpr):
    """Chunks of packed sequences: one program per sequence, and one that fills up the table with empty chunks.

    Writes `table`, `[NT, 4]` int32: sequence, first token, number of tokens, position of the first token; and
    `bounds`, `[N + 1]` int32: the first chunk of each sequence.
    """
    n = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    first = n * 0
    for i in range(0, n, BLOCK):
        before = i + block < n
        start = tl.load(cu_seqlens + i + block, mask=before, other=0)
        end = tl.load(cu_seqlens + i + block + 1, mask=before, other=0)
        first += tl.sum((end - start + (C - 1)) // C).to(tl.int32)
    tl.store(bounds + n, first)
    start = tl.load(cu_seqlens + n).to(tl.int32)
    end = tl.load(cu_seqlens + tl.minimum(n + 1, N)).to(tl.int32)
    chunks = (end - start + (C - 1)) // C
    if n == N:
        chunks = NT - first
    for i in range(0, chunks, BLOCK):
        c = i + block
        row = table + 4 * (first + c)
        here = c < chunks
        tl.store(row, tl.minimum(n, N - 1) + c * 0, mask=here)
        tl.store(row + 1, start + c * C, mask=here)
        tl.store(row + 2, tl.maximum(tl.minimum(end - start - c * C, C), 0), mask=here)
        tl.store(row + 3, c * C, mask=here)


@triton.jit
def leave(x, tokens, left, states, at, c, h, H, m0, WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr,
          M: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """`states[c, h] = leftᵀ x` for BS slots; `tokens` are x's first BD columns."""
    for d in range(0, WIDTH, BD):
        if WIDTH > BD:
            tokens = load_tile(x, at, h, d, WIDTH, C, BD, OP)
        new = tl.dot(tl.trans(tokens), left, input_precision=PRECISION)
        pointers, exists = state_tile(states, c, h, H, m0, d, WIDTH, W, COL, M, BS, BD)
        tl.store(pointers, tl.trans(new), mask=exists)


@triton.jit
def chunk_states_kernel(
    k, v, g, s, slot, gating, states, decay, bands, sums, written, table, T, H,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk leaves at its end: `states[c, h] = Σ_j exp(G_end - G_j) s_j [k_j | v_j]`, `[M, DK + DV]`.

    Also `decay[c, h]`, `[M]`: by how much (log) the chunk shrinks what was there before; and `bands[c, h]`, the number
    of bands its weights need (see `blocks.band_write`). With KEEP, for the backward pass, also G, `[B, T, H, M]` fp32
    in `sums`, and `exp(-G_j) s_j` in the operand dtype in `written`, s_j where one band is not enough for a slot. One
    program per chunk and key/value head, BS slots at a time.
    """
    c, h = tl.program_id(0), tl.program_id(1)
    at = locate(c, table, T, C, PACKED)
    k_tile = load_tile(k, at, h, 0, DK, C, BD, OP)
    v_tile = load_tile(v, at, h, 0, DV, C, BD, OP)
    W: tl.constexpr = DK + DV
    # Like a thread's share of G, so that the gates are not computed twice to have them in two layouts.
    RUN: tl.constexpr = 4 if KEEP else 16
    deepest = 0.0
    for m0 in range(0, M, BS):
        gate, strength = load_gates(g, s, slot, at, h, m0, gating, M, C, BS, GATE, RUN)
        G = cumulative(gate)
        end = last_row(G, C)
        share = tl.exp(end[None, :] - G) * strength
        left = share.to(OP)
        leave(k, k_tile, left, states, at, c, h, H, m0, DK, W, 0, M, C, BS, BD, OP, PRECISION)
        leave(v, v_tile, left, states, at, c, h, H, m0, DV, W, DK, M, C, BS, BD, OP, PRECISION)
        m = m0 + tl.arange(0, BS)
        tl.store(decay + (c * H + h) * M + m, end, mask=m < M)
        deepest = tl.maximum(deepest, -tl.min(end))
        if KEEP:
            pointers, exists = tile(sums, at, h, m0, M, C, BS)
            tl.store(pointers, G, mask=exists)
            pointers, exists = tile(written, at, h, m0, M, C, BS, RUN)
            write = tl.where((end < -ONE_BAND)[None, :], strength, share * tl.exp(tl.minimum(-end, ONE_BAND))[None, :])
            tl.store(pointers, operand(write, OP, PRECISION), mask=exists)
    count = tl.where(deepest <= ONE_BAND, 1, 1 + tl.floor(deepest / MANY_BANDS).to(tl.int32))
    tl.store(bands + c * H + h, tl.where(at.length > 0, count, 0))


@triton.jit
def scanned(states, decay, first, i, count, h, H, e, here, M: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """Chunk i of a scan: where its elements e lie, whether they exist, what they hold, what is kept of those before.

    Beyond the last chunk: nothing, and all."""
    here = here & (i < count)
    c = (first + (count - 1 - i if REVERSE else i)).to(tl.int64) * H + h
    there = states + c * (M * W) + e
    new = tl.load(there, mask=here, other=0.0).to(tl.float32)
    return there, here, new, tl.exp(tl.load(decay + c * M + e // W, mask=here, other=0.0))


@triton.jit
def scan_kernel(
    states, decay, bounds, first_keys, first_values, last_keys, last_values, per, H,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """`x ← exp(decay[c]) x + states[c]` over the chunks of a sequence, `states[c]` replaced by the x before it.

    Forward, x is the slot state: from the initial one to the final one. In reverse, it is the gradient: from the final
    state's to the initial one's. One program per sequence, head and BLOCK elements of `[M, DK + DV]`.
    """
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    W: tl.constexpr = DK + DV
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = e < M * W
    m, d = e // W, e % W
    is_key = here & (d < DK)
    is_value = here & (d >= DK)
    of_keys = ((n * H + h) * M + m) * DK + d
    of_values = ((n * H + h) * M + m) * DV + d - DK
    x = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        x += tl.load(first_keys + of_keys, mask=is_key, other=0.0).to(tl.float32)
        x += tl.load(first_values + of_values, mask=is_value, other=0.0).to(tl.float32)
    if PACKED:
        first, count = tl.load(bounds + n), tl.load(bounds + n + 1) - tl.load(bounds + n)
    else:
        first, count = n * per, per
    for i in range(0, count, 4):  # four at a time, so that four loads are on their way
        there0, here0, new0, keep0 = scanned(states, decay, first, i, count, h, H, e, here, M, W, REVERSE)
        there1, here1, new1, keep1 = scanned(states, decay, first, i + 1, count, h, H, e, here, M, W, REVERSE)
        there2, here2, new2, keep2 = scanned(states, decay, first, i + 2, count, h, H, e, here, M, W, REVERSE)
        there3, here3, new3, keep3 = scanned(states, decay, first, i + 3, count, h, H, e, here, M, W, REVERSE)
        tl.store(there0, x.to(states.dtype.element_ty), mask=here0)
        x = keep0 * x + new0
        tl.store(there1, x.to(states.dtype.element_ty), mask=here1)
        x = keep1 * x + new1
        tl.store(there2, x.to(states.dtype.element_ty), mask=here2)
        x = keep2 * x + new2
        tl.store(there3, x.to(states.dtype.element_ty), mask=here3)
        x = keep3 * x + new3
    if HAS_LAST:
        tl.store(last_keys + of_keys, x, mask=is_key)
        tl.store(last_values + of_values, x, mask=is_value)
