"""The forward pass of a chunk: logits, softmax and output on chip."""

import triton
import triton.language as tl

from t2r_kernels.triton.blocks import (
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
    stack,
    visible_slots,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(x, at, h, first, d, GROUP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
              BD: tl.constexpr, OP: tl.constexpr):  # fmt: skip
    """`[HEADS * C, BD]` of query heads, see `head_rows`, in the operand dtype."""
    pointers, exists = head_rows(x, at, h, first, d, GROUP, WIDTH, C, HEADS, BD)
    return tl.load(pointers, mask=exists, other=0.0).to(OP)


@triton.jit
def load_pair(x, states, at, c, h, H, d, WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, M: tl.constexpr,
              C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr):  # fmt: skip
    """Columns d and on of a chunk's tokens, `[C, BD]`, and of its state, `[BM, BD]`."""
    state = load_state(states, c, h, H, 0, d, WIDTH, W, COL, M, BM, BD, OP)
    return load_tile(x, at, h, d, WIDTH, C, BD, OP), state


@triton.jit
def products(
    x, first, tokens, state, y, states, at, c, h, H, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, M: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x yᵀ`, `[R, C]`; `x stateᵀ`, `[R, BM]`; and x's first BD columns, for the R = HEADS * C rows of x's heads.

    `tokens` and `state` are y's and its state's first BD columns.
    """
    rows = load_rows(x, at, h, first, 0, GROUP, WIDTH, C, HEADS, BD, OP)
    with_tokens = tl.dot(rows, tl.trans(tokens), input_precision=PRECISION)
    with_state = tl.dot(rows, tl.trans(state), input_precision=PRECISION)
    for d in range(BD, WIDTH, BD):
        more = load_rows(x, at, h, first, d, GROUP, WIDTH, C, HEADS, BD, OP)
        more_tokens, more_state = load_pair(y, states, at, c, h, H, d, WIDTH, W, COL, M, C, BM, BD, OP)
        with_tokens = tl.dot(more, tl.trans(more_tokens), with_tokens, input_precision=PRECISION)
        with_state = tl.dot(more, tl.trans(more_state), with_state, input_precision=PRECISION)
    return with_tokens, with_state, rows


@triton.jit
def read_through(S, U, G_rows, G, strength, written, count, OP: tl.constexpr, PRECISION: tl.constexpr,
                 BANDED: tl.constexpr):  # fmt: skip
    """`U_i + Σ_j S_ij W_ij / exp(G_i)`, `[R, BM]`: what queries read from slots, given their scores with C tokens.

    With BANDED the result comes multiplied by exp(G_i): it need not be representable without.
    """
    if not BANDED:
        return tl.dot(S, written, U, input_precision=PRECISION)
    total = tl.exp(G_rows) * U
    for b in range(count):
        write = (band_write(G, b) * strength).to(OP)
        total += band_read(G_rows, b) * tl.dot(S, write, input_precision=PRECISION)
    return total


@triton.jit
def weigh_tokens(P, reading, G_rows, G, strength, written, count, OP: tl.constexpr, PRECISION: tl.constexpr,
                 BANDED: tl.constexpr):  # fmt: skip
    """`Σ_m P_im W_ijm`, `[R, C]`: the weight of token j for query i. `reading` is `exp(G) P` in the operand dtype."""
    if not BANDED:
        return tl.dot(reading, tl.trans(written), input_precision=PRECISION)
    total = tl.zeros([P.shape[0], G.shape[0]], tl.float32)
    for b in range(count):
        write = (band_write(G, b) * strength).to(OP)
        total += tl.dot((P * band_read(G_rows, b)).to(OP), tl.trans(write), input_precision=PRECISION)
    return total


@triton.jit
def softmax(logits, scale, visible):
    """Of `scale * logits` over slots, hidden ones at 0; and the log-sum-exp of those that are not."""
    logits = tl.where(visible, logits * (scale * LOG2_E), float("-inf"))
    top = tl.max(logits, 1)
    p = tl.exp2(logits - top[:, None])
    total = tl.sum(p, 1)
    return p * (1.0 / total)[:, None], (top + tl.log2(total)) * LN_2


@triton.jit
def write_output(x, by_slot, by_token, tokens, state, at, h, first, d, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                 C: tl.constexpr, HEADS: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Columns d and on of query heads' `by_slot state + by_token tokens`, given these columns of state and tokens."""
    out = tl.dot(by_slot, state, input_precision=PRECISION)
    out = tl.dot(by_token, tokens, out, input_precision=PRECISION)
    pointers, exists = head_rows(x, at, h, first, d, GROUP, WIDTH, C, HEADS, BD)
    tl.store(pointers, out.to(x.data.dtype.element_ty), mask=exists)


@triton.jit
def output_kernel(
    q, k, v, g, s, slot, gating, o, lse, states, bands, table, offsets, T, H, scale,
    GROUP: tl.constexpr, M: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, HIDE: tl.constexpr,
    LSE: tl.constexpr, BANDED: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk's queries, for the GROUP heads that share one state. One program per chunk and state head.

    `states[c, h]` is the state before the chunk. With LSE, also the log-sum-exp of each softmax, `[B, T, HQ]` fp32.
    With BANDED, only the chunks that need several bands; without it, only those that need one.
    """
    c, h = tl.program_id(0), tl.program_id(1)
    count = tl.load(bands + c * H + h)
    if (count == 0) | ((count > 1) != BANDED):
        return
    at = locate(c, table, T, C, PACKED)
    gate, strength = load_gates(g, s, slot, at, h, 0, gating, M, C, BM, GATE)
    G = cumulative(gate)
    G_rows = stack(G, HEADS)
    visible = visible_slots(at, offsets, M, C, HEADS, BM, HIDE)
    causal = (tl.arange(0, HEADS * C) % C)[:, None] >= tl.arange(0, C)[None, :]
    decay = tl.exp(G_rows)
    written = strength.to(OP) if BANDED else (tl.exp(-G) * strength).to(OP)
    W: tl.constexpr = DK + DV
    k_tile, keys = load_pair(k, states, at, c, h, H, 0, DK, W, 0, M, C, BM, BD, OP)
    v_tile, values = load_pair(v, states, at, c, h, H, 0, DV, W, DK, M, C, BM, BD, OP)
    for a in range(0, GROUP, HEADS):
        S, U, _ = products(
            q, a, k_tile, keys, k, states, at, c, h, H, GROUP, DK, W, 0, M, C, HEADS, BM, BD, OP, PRECISION
        )
        S = tl.where(causal, S, 0.0).to(OP)
        logits = read_through(S, U, G_rows, G, strength, written, count, OP, PRECISION, BANDED)
        if not BANDED:
            logits *= decay
        p, total = softmax(logits, scale, visible)
        if LSE:
            place, exists = head_numbers(lse, at, h, a, GROUP, C, HEADS)
            sees = any_visible(at, offsets, C, HEADS, HIDE)
            tl.store(place, tl.where(sees, total, float("-inf")), mask=exists)
        reading = (p * decay).to(OP)
        A = weigh_tokens(p, reading, G_rows, G, strength, written, count, OP, PRECISION, BANDED)
        A = tl.where(causal, A, 0.0).to(OP)
        write_output(o, reading, A, v_tile, values, at, h, a, 0, GROUP, DV, C, HEADS, BD, PRECISION)
        for d in range(BD, DV, BD):
            tokens, state = load_pair(v, states, at, c, h, H, d, DV, W, DK, M, C, BM, BD, OP)
            write_output(o, reading, A, tokens, state, at, h, a, d, GROUP, DV, C, HEADS, BD, PRECISION)
