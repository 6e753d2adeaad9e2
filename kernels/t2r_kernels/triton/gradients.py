"""The backward pass of a chunk, everything recomputed from the inputs and the state before it."""

import triton
import triton.language as tl

from t2r_kernels.triton.blocks import (
    FREE,
    FUSED,
    ONE_BAND,
    TEMPERED,
    any_visible,
    band_read,
    band_write,
    cumulative,
    head_numbers,
    head_rows,
    load_gates,
    load_state,
    load_tile,
    locate,
    one_minus_exp,
    operand,
    stack,
    state_tile,
    tile,
    unstack_sum,
    visible_slots,
)
from t2r_kernels.triton.output import load_pair, load_rows, products, read_through, softmax, weigh_tokens, write_output


@triton.jit
def chunk_weights(g, s, slot, gating, sums, written, at, h, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
                  GATE: tl.constexpr, OP: tl.constexpr, BANDED: tl.constexpr):  # fmt: skip
    """G, write strengths (with BANDED) and `exp(-G) s` as operand (without), `[C, BM]`."""
    if BANDED:
        gate, strength = load_gates(g, s, slot, at, h, 0, gating, M, C, BM, GATE)
        return cumulative(gate), strength, strength.to(OP)
    pointers, exists = tile(sums, at, h, 0, M, C, BM)
    G = tl.load(pointers, mask=exists, other=0.0)
    return G, G, load_tile(written, at, h, 0, M, C, BM, OP)


@triton.jit
def query_gradients_kernel(
    q, k, v, g, s, slot, gating, do, d_lse, dq, weights, d_logits, rows, sums, written, states, bands, table, offsets,
    T, H, scale,
    GROUP: tl.constexpr, M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, HIDE: tl.constexpr,
    LSE: tl.constexpr, BANDED: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq`, and for the kernels that follow: what the other gradients of a chunk are made of.

    `weights` and `d_logits`, `[B, T, HQ, M]`: the softmax and the gradient of its logits (scale included), each times
    exp(G_i) unless BANDED. `rows`, `[B, T, H, M]` fp32: the derivative of the loss by G_i, as reads i see it. With LSE,
    the loss has the derivative `d_lse`, `[B, T, HQ]`, by the log-sum-exp too.

    One program per chunk, state head and BD columns; which chunks, as for `output_kernel`.
    """
    c, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    count = tl.load(bands + c * H + h)
    if (count == 0) | ((count > 1) != BANDED):
        return
    at = locate(c, table, T, C, PACKED)
    G, strength, write = chunk_weights(g, s, slot, gating, sums, written, at, h, M, C, BM, GATE, OP, BANDED)
    G_rows = stack(G, HEADS)
    visible = visible_slots(at, offsets, M, C, HEADS, BM, HIDE)
    causal = (tl.arange(0, HEADS * C) % C)[:, None] >= tl.arange(0, C)[None, :]
    decay = tl.exp(G_rows)
    W: tl.constexpr = DK + DV
    k_tile, keys = load_pair(k, states, at, c, h, H, 0, DK, W, 0, M, C, BM, BD, OP)
    v_tile, values = load_pair(v, states, at, c, h, H, 0, DV, W, DK, M, C, BM, BD, OP)
    if DK > BD:
        k_here, keys_here = load_pair(k, states, at, c, h, H, column, DK, W, 0, M, C, BM, BD, OP)
    else:
        k_here, keys_here = k_tile, keys
    by_read = tl.zeros([HEADS * C, BM], tl.float32)
    for a in range(0, GROUP, HEADS):
        S, U, _ = products(
            q, a, k_tile, keys, k, states, at, c, h, H, GROUP, DK, W, 0, M, C, HEADS, BM, BD, OP, PRECISION
        )
        dA, dP, _ = products(
            do, a, v_tile, values, v, states, at, c, h, H, GROUP, DV, W, DK, M, C, HEADS, BM, BD, OP, PRECISION
        )
        S = operand(tl.where(causal, S, 0.0), OP, PRECISION)
        dA = operand(tl.where(causal, dA, 0.0), OP, PRECISION)
        all_U = read_through(S, U, G_rows, G, strength, write, count, OP, PRECISION, BANDED)
        all_dP = read_through(dA, dP, G_rows, G, strength, write, count, OP, PRECISION, BANDED)
        p, _ = softmax(all_U if BANDED else all_U * decay, scale, visible)
        dp = all_dP if BANDED else all_dP * decay
        delta = tl.sum(p * dp, 1)
        if LSE:
            place, exists = head_numbers(d_lse, at, h, a, GROUP, C, HEADS)
            sees = any_visible(at, offsets, C, HEADS, HIDE)
            delta -= tl.load(place, mask=exists & sees, other=0.0)
        dl = p * (dp - delta[:, None]) * scale
        reading, d_reading = operand(p * decay, OP, PRECISION), operand(dl * decay, OP, PRECISION)
        # From the operands that the columns come from, rounded alike, so that what must cancel between them does.
        if BANDED:
            p, dl = operand(p, OP, PRECISION).to(tl.float32), operand(dl, OP, PRECISION).to(tl.float32)
            by_read += decay * (dl * U + p * dP)
            for b in range(count):
                read, band = band_read(G_rows, b), operand(band_write(G, b) * strength, OP, PRECISION)
                by_read += operand(p * read, OP, PRECISION).to(tl.float32) * tl.dot(dA, band, input_precision=PRECISION)
                by_read += operand(dl * read, OP, PRECISION).to(tl.float32) * tl.dot(S, band, input_precision=PRECISION)
        else:
            by_read += d_reading.to(tl.float32) * all_U + reading.to(tl.float32) * all_dP
        if column == 0:
            pointers, is_slot = head_rows(weights, at, h, a, 0, GROUP, M, C, HEADS, BM)
            tl.store(pointers, p.to(OP) if BANDED else reading, mask=is_slot)
            pointers, is_slot = head_rows(d_logits, at, h, a, 0, GROUP, M, C, HEADS, BM)
            tl.store(pointers, dl.to(OP) if BANDED else d_reading, mask=is_slot)
        dS = weigh_tokens(dl, d_reading, G_rows, G, strength, write, count, OP, PRECISION, BANDED)
        dS = tl.where(causal, dS, 0.0).to(OP)
        write_output(dq, d_reading, dS, k_here, keys_here, at, h, a, column, GROUP, DK, C, HEADS, BD, PRECISION)
    if column == 0:
        pointers, is_slot = tile(rows, at, h, 0, M, C, BM)
        tl.store(pointers, unstack_sum(by_read, HEADS), mask=is_slot)


@triton.jit
def within_chunk(
    x, tokens, y, by_write, by_pair, out, d_states, at, c, h, H, column, causal, decay, G_rows, G, strength, written,
    count,
    GROUP: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
    BANDED: tl.constexpr,
):  # fmt: skip
    """`out_j = Σ_i x_i Σ_m y_im W_ijm`, and `d_states = Σ_i exp(G_i) y_i x_iᵀ`, over the queries i of all heads.

    Returns by_write and by_pair plus this x's part in them, see `token_gradients_kernel`.
    """
    token_grad = tl.zeros([BD, C], tl.float32)  # transposed, so that x's tile in shared memory is the left operand
    state_grad = tl.zeros([BD, BM], tl.float32)
    first = load_tile(tokens, at, h, 0, WIDTH, C, BD, OP)
    for a in range(0, GROUP, HEADS):
        x_rows = load_rows(x, at, h, a, 0, GROUP, WIDTH, C, HEADS, BD, OP)
        S = tl.dot(x_rows, tl.trans(first), input_precision=PRECISION)
        for d in range(BD, WIDTH, BD):
            more = load_tile(tokens, at, h, d, WIDTH, C, BD, OP)
            more_rows = load_rows(x, at, h, a, d, GROUP, WIDTH, C, HEADS, BD, OP)
            S = tl.dot(more_rows, tl.trans(more), S, input_precision=PRECISION)
        if WIDTH > BD:
            x_rows = load_rows(x, at, h, a, column, GROUP, WIDTH, C, HEADS, BD, OP)
        S = operand(tl.where(causal, S, 0.0), OP, PRECISION)
        P = load_rows(y, at, h, a, 0, GROUP, M, C, HEADS, BM, OP)
        reading = (P * decay).to(OP) if BANDED else P
        A = weigh_tokens(P, reading, G_rows, G, strength, written, count, OP, PRECISION, BANDED)
        A = tl.where(causal, A, 0.0).to(OP)
        state_grad = tl.dot(tl.trans(x_rows), reading, state_grad, input_precision=PRECISION)
        token_grad = tl.dot(tl.trans(x_rows), A, token_grad, input_precision=PRECISION)
        if BANDED:
            for b in range(count):
                through = tl.dot(
                    tl.trans(S), operand(P * band_read(G_rows, b), OP, PRECISION), input_precision=PRECISION
                )
                by_write += band_write(G, b) * through
                by_pair += operand(band_write(G, b) * strength, OP, PRECISION).to(tl.float32) * through
        else:
            by_write = tl.dot(tl.trans(S), P, by_write, input_precision=PRECISION)
    pointers, exists = tile(out, at, h, column, WIDTH, C, BD)
    tl.store(pointers, tl.trans(token_grad).to(out.data.dtype.element_ty), mask=exists)
    pointers, exists = state_tile(d_states, c, h, H, 0, column, WIDTH, W, COL, M, BM, BD)
    tl.store(pointers, tl.trans(state_grad), mask=exists)
    return by_write, by_pair


@triton.jit
def token_gradients_kernel(
    q, k, v, g, s, slot, gating, do, dk, dv, weights, d_logits, rows, columns, sums, written, d_states, bands, table,
    T, H,
    GROUP: tl.constexpr, M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, BANDED: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` through the chunk's own outputs, and likewise the gradient of the state before it, `d_states`.

    Also `columns`, `[B, T, H, M]` fp32: the derivative of the loss by write strengths s_j within the chunk, times
    exp(G_j) unless BANDED. With BANDED, what they come to for the gates is taken off `rows` here, band by band.

    One program per chunk, state head and BD columns; which chunks, as for `output_kernel`.
    """
    c, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    count = tl.load(bands + c * H + h)
    if (count == 0) | ((count > 1) != BANDED):
        return
    at = locate(c, table, T, C, PACKED)
    G, strength, write = chunk_weights(g, s, slot, gating, sums, written, at, h, M, C, BM, GATE, OP, BANDED)
    G_rows = stack(G, HEADS)
    causal = (tl.arange(0, HEADS * C) % C)[:, None] >= tl.arange(0, C)[None, :]
    decay = tl.exp(G_rows)
    W: tl.constexpr = DK + DV
    by_write = tl.zeros([C, BM], tl.float32)
    by_pair = tl.zeros([C, BM], tl.float32)
    by_write, by_pair = within_chunk(
        q, k, d_logits, by_write, by_pair, dk, d_states, at, c, h, H, column, causal, decay, G_rows, G, strength, write,
        count,
        GROUP, M, DK, W, 0, C, HEADS, BM, BD, OP, PRECISION, BANDED,
    )  # fmt: skip
    by_write, by_pair = within_chunk(
        do, v, weights, by_write, by_pair, dv, d_states, at, c, h, H, column, causal, decay, G_rows, G, strength, write,
        count,
        GROUP, M, DV, W, DK, C, HEADS, BM, BD, OP, PRECISION, BANDED,
    )  # fmt: skip
    if column == 0:
        pointers, is_slot = tile(columns, at, h, 0, M, C, BM)
        tl.store(pointers, by_write, mask=is_slot)
        if BANDED:
            pointers, is_slot = tile(rows, at, h, 0, M, C, BM)
            tl.store(pointers, tl.load(pointers, mask=is_slot, other=0.0) - by_pair, mask=is_slot)


@triton.jit
def through_state(
    x, out, left, through, kept, states, d_states, at, c, h, H, column,
    WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to x's gradient in `out` (columns `column` and on) what comes through the state after the chunk; returns
    through and kept plus this x's part in them, see `state_gradients_kernel`."""
    first = load_state(d_states, c, h, H, 0, 0, WIDTH, W, COL, M, BM, BD, OP)
    state = load_state(states, c, h, H, 0, 0, WIDTH, W, COL, M, BM, BD, OP)
    kept += tl.sum(state.to(tl.float32) * first.to(tl.float32), 1)
    through = tl.dot(load_tile(x, at, h, 0, WIDTH, C, BD, OP), tl.trans(first), through, input_precision=PRECISION)
    for d in range(BD, WIDTH, BD):
        d_state = load_state(d_states, c, h, H, 0, d, WIDTH, W, COL, M, BM, BD, OP)
        state = load_state(states, c, h, H, 0, d, WIDTH, W, COL, M, BM, BD, OP)
        kept += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        tokens = load_tile(x, at, h, d, WIDTH, C, BD, OP)
        through = tl.dot(tokens, tl.trans(d_state), through, input_precision=PRECISION)
    if WIDTH > BD:
        first = load_state(d_states, c, h, H, 0, column, WIDTH, W, COL, M, BM, BD, OP)
    pointers, exists = tile(out, at, h, column, WIDTH, C, BD)
    grad = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    grad += tl.dot(left, first, input_precision=PRECISION)
    tl.store(pointers, grad.to(out.data.dtype.element_ty), mask=exists)
    return through, kept


@triton.jit
def state_gradients_kernel(
    k, v, dk, dv, sums, written, through, kept, states, d_states, decay, bands, table, T, H,
    M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Complete `dk` and `dv` with what comes through the state after the chunk, whose gradient is `d_states[c, h]`.

    Also `through`, `[B, T, H, M]` fp32: the derivative of the loss by what a token leaves in that state; and `kept`,
    `[chunks, H, M]` fp32: by how much of the state before the chunk is kept. One program per chunk, state head and BD
    columns.
    """
    c, h, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    count = tl.load(bands + c * H + h)
    if count == 0:
        return
    at = locate(c, table, T, C, PACKED)
    m = tl.arange(0, BM)
    end = tl.load(decay + (c * H + h) * M + m, mask=m < M, other=0.0)
    pointers, exists = tile(sums, at, h, 0, M, C, BM)
    from_G = tl.load(pointers, mask=exists & (count > 1) & (end < -ONE_BAND)[None, :], other=0.0)  # see `written`
    left = (tl.exp(end[None, :] - from_G) * load_tile(written, at, h, 0, M, C, BM, tl.float32)).to(OP)
    by_left = tl.zeros([C, BM], tl.float32)
    by_keep = tl.zeros([BM], tl.float32)
    W: tl.constexpr = DK + DV
    by_left, by_keep = through_state(
        k, dk, left, by_left, by_keep, states, d_states, at, c, h, H, column,
        DK, W, 0, M, C, BM, BD, OP, PRECISION,
    )  # fmt: skip
    by_left, by_keep = through_state(
        v, dv, left, by_left, by_keep, states, d_states, at, c, h, H, column,
        DV, W, DK, M, C, BM, BD, OP, PRECISION,
    )  # fmt: skip
    if column == 0:
        pointers, is_slot = tile(through, at, h, 0, M, C, BM)
        tl.store(pointers, by_left, mask=is_slot)
        tl.store(kept + (c * H + h) * M + m, by_keep, mask=m < M)


@triton.jit
def load_float(x, at, h, m0, M: tl.constexpr, C: tl.constexpr, BS: tl.constexpr):
    """`[C, BS]` of a view as fp32, in one layout whatever the dtype."""
    pointers, exists = tile(x, at, h, m0, M, C, BS, 4)
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def gate_gradients_kernel(
    g, s, slot, gating, dg, ds, rows, columns, sums, written, through, kept, decay, bands, table, T, H,
    M: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gates' gradients, from what the kernels before found.

    Each pair of a write j and a read i > j gives its weight's share to every gate between them. Pairs within the chunk:
    rows less columns, summed from the end. Reads of what was there before: in the rows. Writes that are read after the
    chunk: a sum from its beginning. No other terms occur, so nothing large cancels. One program per chunk, state head
    and BS slots.
    """
    c, h, m0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BS
    count = tl.load(bands + c * H + h)
    if count == 0:
        return
    at = locate(c, table, T, C, PACKED)
    m = m0 + tl.arange(0, BS)
    end = tl.load(decay + (c * H + h) * M + m, mask=m < M, other=0.0)
    by_keep = tl.load(kept + (c * H + h) * M + m, mask=m < M, other=0.0)
    gate, strength = load_gates(g, s, slot, at, h, m0, gating, M, C, BS, GATE, 4)
    G = load_float(sums, at, h, m0, M, C, BS)
    by_left = load_float(through, at, h, m0, M, C, BS)
    by_write = load_float(columns, at, h, m0, M, C, BS)
    scaled = tl.where(count > 1, 1.0, tl.exp(tl.minimum(-G, ONE_BAND)))  # see `columns` in `token_gradients_kernel`
    write = tl.where(count > 1, 0.0, load_float(written, at, h, m0, M, C, BS))
    to_end = tl.exp(end[None, :] - G)
    at_end = to_end * strength * by_left
    within = load_float(rows, at, h, m0, M, C, BS) - write * by_write
    # Σ_(i ≥ t) within_i + Σ_(j < t) at_end_j, in one running sum.
    gate_grad = tl.cumsum(at_end - within, 0) - (at_end - within)
    gate_grad += (tl.sum(within, 0) + tl.exp(end) * by_keep)[None, :]
    s_grad = scaled * by_write + to_end * by_left
    if GATE == FREE:
        pointers, is_slot = tile(ds, at, h, m0, M, C, BS, 4)
        tl.store(pointers, s_grad.to(ds.data.dtype.element_ty), mask=is_slot)
    else:
        gate_grad -= (1.0 - strength) * s_grad
    if GATE == FUSED:
        gate_grad *= strength
    if GATE == TEMPERED:
        gate_grad *= one_minus_exp(gate * gating.normalizer) * gating.inverse
    pointers, is_slot = tile(dg, at, h, m0, M, C, BS, 4)
    tl.store(pointers, gate_grad.to(dg.data.dtype.element_ty), mask=is_slot)
