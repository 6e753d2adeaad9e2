"""What every kernel needs on the device: where a chunk lies, its gates, and the weights between its tokens."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# How `g` arrives: log gates, log gates with write strengths of their own, the gate projection's output, or that
# output with a normalizer other than 1.
DERIVED, FREE, FUSED, TEMPERED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

# A gate below this forgets all that fp32 can tell: exp(-40) = 4e-18.
LOWEST = tl.constexpr(-40.0)
# Chunks whose every slot decays by less than exp(ONE_BAND) need one band; others are cut into bands of MANY_BANDS.
ONE_BAND = tl.constexpr(64.0)
MANY_BANDS = tl.constexpr(40.0)


class View(NamedTuple):
    """A `[B, T, heads, width]` tensor for a kernel: its data and strides. The last stride is 1."""

    data: Tensor | None
    b: int
    t: int
    h: int


class Chunk(NamedTuple):
    """Where a chunk lies: sequence, batch row, first token, number of tokens, the first token's position."""

    n: object
    b: object
    start: object
    length: object
    position: object


class Gating(NamedTuple):
    """How a gate projection's output becomes a log gate (see `t2r_kernels.gate.Gate`)."""

    write_logit: float
    keep_logit: float
    normalizer: float
    inverse: float  # 1 / normalizer


@triton.jit
def operand(x, OP: tl.constexpr, PRECISION: tl.constexpr):
    """x as the tensor cores will see it: bf16, fp32, or fp32 cut to the bits of tf32."""
    if (OP == tl.float32) & (PRECISION == "tf32"):  # noqa: SIM300
        return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return x.to(OP)


@triton.jit
def locate(c, table, T, C: tl.constexpr, PACKED: tl.constexpr):
    """The `Chunk` with index c: from the table of packed sequences, or counted off in rows of T tokens."""
    if PACKED:
        n = tl.load(table + 4 * c)
        return Chunk(n, n * 0, tl.load(table + 4 * c + 1), tl.load(table + 4 * c + 2), tl.load(table + 4 * c + 3))
    per = tl.cdiv(T, C)
    n = c // per
    start = (c % per) * C
    return Chunk(n, n, start, tl.minimum(T - start, C), start)


@triton.jit
def tile(x, at, h, d0, WIDTH: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, RUN: tl.constexpr = 16):
    """Pointers `[C, BD]` to a chunk of one head of a `View`, columns d0 and on, and which of them exist.

    A thread takes at most RUN columns that lie side by side.
    """
    i = tl.arange(0, C)
    d = d0 + tl.max_contiguous(tl.arange(0, BD), RUN)
    base = x.data + at.b.to(tl.int64) * x.b + at.start.to(tl.int64) * x.t + h.to(tl.int64) * x.h
    exists = (i < at.length)[:, None] & (d < WIDTH)[None, :]
    return base + (i[:, None] * x.t + d[None, :]), exists


@triton.jit
def load_tile(x, at, h, d0, WIDTH: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr):
    """`[C, BD]` of a `View` in the operand dtype, zero where nothing is."""
    pointers, exists = tile(x, at, h, d0, WIDTH, C, BD)
    return tl.load(pointers, mask=exists, other=0.0).to(OP)


@triton.jit
def head_rows(x, at, h, first, d0, GROUP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
              BD: tl.constexpr):  # fmt: skip
    """Pointers `[HEADS * C, BD]` to a chunk of query heads first and on of group h, one below the other."""
    r = tl.arange(0, HEADS * C)
    i, a = r % C, first + r // C
    d = d0 + tl.arange(0, BD)
    base = x.data + at.b.to(tl.int64) * x.b + at.start.to(tl.int64) * x.t + (h * GROUP).to(tl.int64) * x.h
    exists = ((i < at.length) & (a < GROUP))[:, None] & (d < WIDTH)[None, :]
    return base + ((i * x.t + a * x.h)[:, None] + d[None, :]), exists


@triton.jit
def head_numbers(x, at, h, first, GROUP: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr):
    """Pointers `[HEADS * C]` to one number for each row of `head_rows`, x being `[B, T, heads]`."""
    r = tl.arange(0, HEADS * C)
    i, a = r % C, first + r // C
    base = x.data + at.b.to(tl.int64) * x.b + at.start.to(tl.int64) * x.t + (h * GROUP).to(tl.int64) * x.h
    return base + i * x.t + a * x.h, (i < at.length) & (a < GROUP)


@triton.jit
def stack(x, HEADS: tl.constexpr):
    """`[C, X]` HEADS times, one below the other."""
    if HEADS == 1:
        return x
    C: tl.constexpr = x.shape[0]
    X: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None, :, :], (HEADS, C, X)), (HEADS * C, X))


@triton.jit
def unstack_sum(x, HEADS: tl.constexpr):
    """The sum of the HEADS blocks of `[HEADS * C, X]`, `[C, X]`."""
    if HEADS == 1:
        return x
    C: tl.constexpr = x.shape[0] // HEADS
    X: tl.constexpr = x.shape[1]
    return tl.sum(tl.reshape(x, (HEADS, C, X)), 0)


@triton.jit
def state_tile(states, c, h, H, m0, d0, WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, M: tl.constexpr,
               BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Pointers `[BM, BD]` into `[chunks, H, M, W]`, slots m0 and columns COL + d0 and on, and which of them exist."""
    m = m0 + tl.arange(0, BM)
    d = d0 + tl.arange(0, BD)
    exists = (m < M)[:, None] & (d < WIDTH)[None, :]
    return states + (c.to(tl.int64) * H + h) * (M * W) + (m[:, None] * W + (COL + d)[None, :]), exists


@triton.jit
def load_state(states, c, h, H, m0, d0, WIDTH: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, M: tl.constexpr,
               BM: tl.constexpr, BD: tl.constexpr, OP: tl.constexpr):  # fmt: skip
    """`[BM, BD]` of a state, see `state_tile`, in the operand dtype, zero where nothing is."""
    pointers, exists = state_tile(states, c, h, H, m0, d0, WIDTH, W, COL, M, BM, BD)
    return tl.load(pointers, mask=exists, other=0.0).to(OP)


@triton.jit
def one_minus_exp(g):
    """`1 - exp(g)` for g <= 0, to fp32's relative precision however small g is."""
    x = tl.maximum(g, -0.5)
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    series = 1 / 24 + x * (1 / 120 + x * series)
    series = 1 / 2 + x * (1 / 6 + x * series)
    return tl.where(g > -0.5, -x * (1.0 + x * series), 1.0 - tl.exp(g))


@triton.jit
def log_sigmoid(z):
    """`log sigmoid(z)` and `sigmoid(-z)`, to fp32's relative precision at both ends.

    With e = exp(-|z|): log(1 + e) = 2 artanh(e / (2 + e)), as a series. One division serves both results.
    """
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / ((1.0 + e) * (2.0 + e))
    y = e * (1.0 + e) * inverse
    x = y * y
    series = 1 / 11 + x * (1 / 13)
    series = 1 / 7 + x * (1 / 9 + x * series)
    series = 1 / 3 + x * (1 / 5 + x * series)
    return tl.minimum(z, 0.0) - 2.0 * y * (1.0 + x * series), tl.where(z > 0.0, e, 1.0) * ((2.0 + e) * inverse)


@triton.jit
def gate_of_logits(x, slot, m, gating, GATE: tl.constexpr):
    """Log gate and write strength of logits x. `slot` broadcasts against x, negative where no token is."""
    z = x + tl.where(m == slot, -gating.write_logit, tl.where(slot < 0, float("inf"), gating.keep_logit))
    gate, strength = log_sigmoid(z)
    if GATE == TEMPERED:
        gate *= gating.inverse
        strength = one_minus_exp(gate)
    return gate, strength


@triton.jit
def load_gates(g, s, slot, at, h, m0, gating, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
               GATE: tl.constexpr, RUN: tl.constexpr = 16):  # fmt: skip
    """Log gates and write strengths of a chunk, slots m0 and on, `[C, BM]` fp32: none where no token or slot is."""
    pointers, exists = tile(g, at, h, m0, M, C, BM, RUN)
    if (GATE == FUSED) | (GATE == TEMPERED):
        i = tl.arange(0, C)
        row = slot.data + at.b.to(tl.int64) * slot.b + at.start.to(tl.int64) * slot.t + h.to(tl.int64) * slot.h
        index = tl.load(row + i * slot.t, mask=i < at.length, other=-1)
        logits = tl.load(pointers, mask=exists, other=float("inf")).to(tl.float32)
        return gate_of_logits(logits, index[:, None], m0 + tl.arange(0, BM)[None, :], gating, GATE)
    gate = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    if GATE == FREE:
        pointers, exists = tile(s, at, h, m0, M, C, BM)
        return gate, tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    return gate, one_minus_exp(gate)


@triton.jit
def cumulative(gate):
    """The sum of a chunk's log gates up to each token, `[C, BM]`."""
    return tl.cumsum(tl.maximum(gate, LOWEST), 0)


@triton.jit
def last_row(x, C: tl.constexpr):
    """The last row of `[C, BM]`."""
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], x, 0.0), 0)


@triton.jit
def visible_slots(at, offsets, M: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr,
                  HIDE: tl.constexpr):  # fmt: skip
    """Which slots take part in the softmax, `[HEADS * C, BM]`."""
    m = tl.arange(0, BM)[None, :]
    i = (tl.arange(0, HEADS * C) % C)[:, None]
    visible = (m < M) & (i >= 0)
    if HIDE:
        position = at.position + tl.load(offsets + at.n) + i
        visible = visible & (m <= tl.maximum(position, 0))
    return visible


@triton.jit
def any_visible(at, offsets, C: tl.constexpr, HEADS: tl.constexpr, HIDE: tl.constexpr):
    """Which queries see a slot, `[HEADS * C]`. Of the others `visible_slots` shows slot 0, so that p exists."""
    i = tl.arange(0, HEADS * C) % C
    if HIDE:
        return at.position + tl.load(offsets + at.n) + i >= 0
    return i >= 0


@triton.jit
def band_write(G, index):
    """What the tokens of band `index` are scaled by where they write, `[C, BM]`; zero for other bands' tokens.

    Band b holds the places where G, the cumulative log gate, lies within MANY_BANDS below -b * MANY_BANDS. Between
    two places of one band or of neighbouring ones, exp(G_i - G_j) = read_i * write_j; farther apart it is nothing.
    """
    below = G + index * MANY_BANDS
    inside = (below <= 0.0) & (below > -MANY_BANDS)
    return tl.where(inside, tl.exp(tl.where(inside, -below, 0.0)), 0.0)


@triton.jit
def band_read(G, index):
    """What is scaled by where it reads from band `index`: see `band_write`."""
    below = G + index * MANY_BANDS
    reached = (below <= 0.0) & (below > -2.0 * MANY_BANDS)
    return tl.where(reached, tl.exp(tl.minimum(below, 0.0)), 0.0)
