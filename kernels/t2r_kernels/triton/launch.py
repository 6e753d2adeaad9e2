"""From tensors to kernel launches: `forward` and `backward` of a whole operator call."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from t2r_kernels.triton.blocks import DERIVED, FREE, FUSED, TEMPERED, Gating, View
from t2r_kernels.triton.configs import Config, config_for
from t2r_kernels.triton.gradients import gate_gradients_kernel, query_gradients_kernel, token_gradients_kernel
from t2r_kernels.triton.output import output_kernel
from t2r_kernels.triton.states import chunk_states_kernel, chunk_table_kernel, scan_kernel
from t2r_kernels.triton.step import step_kernel


def block(width: int, least: int = 16) -> int:
    """The tile that `width` columns take: a power of two, at least what a tensor core multiplies."""
    return max(least, triton.next_power_of_2(width))


def view(x: Tensor) -> View:
    """A `[B, T, heads, ...]` tensor as the kernels take it; copied only if its last stride is not 1."""
    if x.ndim == 4 and x.stride(3) != 1:
        x = x.contiguous()
    return View(x, x.stride(0), x.stride(1), x.stride(2))


@dataclass
class Call:
    """One call of the operator: its inputs, and what every kernel of it is launched with.

    Tensors as for `gsa`; `g` holds logits when `slot`, `[B, T, H]` int32, is given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    s: Tensor | None
    slot: Tensor | None
    cu_seqlens: Tensor | None
    offsets: Tensor | None  # [N], None when no slot is hidden
    scale: float
    gating: Gating

    def __post_init__(self):
        (self.B, self.T, self.H, self.M), self.HQ = self.g.shape, self.q.shape[2]
        self.DK, self.DV = self.k.shape[3], self.v.shape[3]
        self.N = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.half = all(x.dtype == torch.bfloat16 for x in (self.q, self.k, self.v))
        self.operand = torch.bfloat16 if self.half else torch.float32
        self.config: Config = config_for(self.q.device, max(self.DK, self.DV), self.M, self.half)
        C = self.config.chunk
        # Each sequence may end in one chunk that is not full: a bound that needs no look at the lengths.
        per = triton.cdiv(self.T, C)
        self.num_chunks = self.B * per if self.cu_seqlens is None else self.T // C + self.N
        self.table, self.bounds = (None, None) if self.cu_seqlens is None else self._chunk_table()
        self.inputs = {"k": view(self.k), "v": view(self.v), "g": view(self.g)}
        self.inputs["s"] = self.inputs["g"] if self.s is None else view(self.s)
        self.inputs["slot"] = self.inputs["g"] if self.slot is None else view(self.slot)
        self.inputs |= {"gating": self.gating, "table": self.table, "T": self.T, "H": self.H}
        self.shape = {
            "M": self.M, "DK": self.DK, "DV": self.DV, "C": C, "BD": self.config.block_d,
            "GATE": gate_kind(self.s, self.slot, self.gating), "PACKED": self.table is not None,
            "OP": triton.language.bfloat16 if self.half else triton.language.float32, "PRECISION": self._precision(),
        }  # fmt: skip
        # Rows of 128 bytes: with rows of 64, Triton 3.6 reads beyond a tile of shared memory on Hopper.
        self.slots = {"BM": block(self.M, least=64 if self.half else 32)}
        self.reading = {
            "q": view(self.q), "offsets": self.offsets, "scale": self.scale,
            "GROUP": self.HQ // self.H, "HIDE": self.offsets is not None,
        }  # fmt: skip

    def _precision(self) -> str:
        """How fp32 operands meet the tensor cores: exactly enough for what they were before."""
        half = all(x.dtype in (torch.float16, torch.bfloat16) for x in (self.q, self.k, self.v))
        return "tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

    def _chunk_table(self) -> tuple[Tensor, Tensor]:
        device = self.q.device
        table = torch.empty(self.num_chunks, 4, dtype=torch.int32, device=device)
        bounds = torch.empty(self.N + 1, dtype=torch.int32, device=device)
        chunk_table_kernel[(self.N + 1,)](
            self.cu_seqlens, table, bounds, self.N, self.num_chunks, C=self.config.chunk, BLOCK=256, num_warps=4
        )
        return table, bounds

    def empty_states(self) -> Tensor:
        """Room for a state a chunk, `[chunks, H, M, DK + DV]`."""
        shape = (self.num_chunks, self.H, self.M, self.DK + self.DV)
        return torch.empty(shape, dtype=self.operand, device=self.q.device)

    def chunk_states(self, sums: Tensor | None = None, written: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What each chunk writes, its decay `[chunks, H, M]` fp32, and its number of bands `[chunks, H]` int32.

        `sums` and `written`, `[B, T, H, M]`, are filled for the backward pass if given.
        """
        states, device = self.empty_states(), self.q.device
        decay = torch.empty(self.num_chunks, self.H, self.M, dtype=torch.float32, device=device)
        bands = torch.empty(self.num_chunks, self.H, dtype=torch.int32, device=device)
        chunk_states_kernel[(self.num_chunks, self.H)](
            **self.inputs, states=states, decay=decay, bands=bands, KEEP=sums is not None,
            sums=self.inputs["g"] if sums is None else view(sums),
            written=self.inputs["g"] if written is None else view(written), **self.shape, **self.config.states,
        )  # fmt: skip
        return states, decay, bands

    def scan(self, states: Tensor, decay: Tensor, first, last, reverse: bool = False) -> None:
        """Turn what chunks write into the state before each, in place; `first` and `last`: (keys, values) or None."""
        BLOCK = self.config.scan["BLOCK"]
        elements = self.M * (self.DK + self.DV)
        scan_kernel[(self.N * self.H, triton.cdiv(elements, BLOCK))](
            states, decay, self.bounds, *(first or (None, None)), *(last or (None, None)),
            triton.cdiv(self.T, self.config.chunk), self.H,
            M=self.M, DK=self.DK, DV=self.DV, PACKED=self.table is not None, REVERSE=reverse,
            HAS_FIRST=first is not None, HAS_LAST=last is not None, **self.config.scan,
        )  # fmt: skip

    def each_chunk(self, kernel, launch: dict, blocks: int = 1, **arguments) -> None:
        """Launch a kernel over all chunks: those that need one band, then those that need more."""
        grid = (self.num_chunks, self.H, blocks)
        heads = min(launch["HEADS"], triton.next_power_of_2(self.HQ // self.H))
        launch = launch | {"HEADS": heads}
        for banded in (False, True):
            kernel[grid](**self.inputs, **arguments, BANDED=banded, **self.shape, **self.slots, **launch)


def forward(call: Call, first: tuple[Tensor, Tensor] | None, last: tuple[Tensor, Tensor] | None) -> Tensor:
    """Outputs `[B, T, HQ, DV]` in q's dtype; `last` (keys, values) is filled with the final state if given."""
    o = torch.empty(call.B, call.T, call.HQ, call.DV, dtype=call.q.dtype, device=call.q.device)
    states, decay, bands = call.chunk_states()
    call.scan(states, decay, first, last)
    call.each_chunk(output_kernel, call.config.output, **call.reading, o=view(o), states=states, bands=bands)
    return o


def backward(
    call: Call,
    do: Tensor,  # [B, T, HQ, DV]
    first: tuple[Tensor, Tensor] | None,
    d_last: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Gradients of q, k, v, g, of s if it was given, and of the initial state if there was one."""
    dq, dk, dv, dg = (empty_like(x) for x in (call.q, call.k, call.v, call.g))
    ds = None if call.s is None else empty_like(call.s)
    d_first = None if first is None else tuple(empty_like(x) for x in first)
    shape, fp32 = (call.B, call.T, call.H, call.M), {"dtype": torch.float32, "device": do.device}
    weights, d_logits = (
        torch.empty(call.B, call.T, call.HQ, call.M, **fp32 | {"dtype": call.operand}) for _ in range(2)
    )
    rows, columns, sums = (torch.empty(shape, **fp32) for _ in range(3))
    written = torch.empty(shape, dtype=call.operand, device=do.device)
    gradients = {"dk": view(dk), "dv": view(dv)}
    scratch = {"weights": view(weights), "d_logits": view(d_logits), "do": view(do)}

    states, decay, bands = call.chunk_states(sums, written)
    call.scan(states, decay, first, None)
    scratch |= {"sums": view(sums), "written": view(written), "bands": bands}
    blocks = triton.cdiv(max(call.DK, call.DV), call.config.block_d)
    call.each_chunk(
        query_gradients_kernel, call.config.queries, blocks, **call.reading, **scratch,
        dq=view(dq), rows=view(rows), states=states,
    )  # fmt: skip
    d_states = call.empty_states()
    call.each_chunk(
        token_gradients_kernel, call.config.tokens, blocks, q=call.reading["q"], GROUP=call.reading["GROUP"],
        **scratch, **gradients, rows=view(rows), columns=view(columns), d_states=d_states,
    )  # fmt: skip
    del weights, d_logits, scratch
    call.scan(d_states, decay, d_last, d_first, reverse=True)
    gate_gradients_kernel[(call.num_chunks, call.H, blocks)](
        **call.inputs, **gradients, dg=view(dg), ds=view(dg if ds is None else ds), rows=view(rows),
        columns=view(columns), sums=view(sums), written=view(written), states=states, d_states=d_states,
        decay=decay, bands=bands, **call.shape, **call.config.gates,
    )  # fmt: skip
    return dq, dk, dv, dg, ds, d_first


def step(
    q: Tensor,  # [B, 1, HQ, DK]
    k: Tensor,  # [B, 1, H, DK]
    v: Tensor,  # [B, 1, H, DV]
    g: Tensor,  # [B, 1, H, M], logits when `slot` is given
    s: Tensor | None,
    slot: Tensor | None,  # [B, 1, H] int32
    positions: Tensor | None,  # [B], None when no slot is hidden
    keys: Tensor,  # [B, H, M, DK] fp32, contiguous
    values: Tensor,  # [B, H, M, DV]
    scale: float,
    gating: Gating,
) -> Tensor:
    """Output `[B, 1, HQ, DV]` of one token, in one launch; the state is updated in place."""
    (B, _, H, M), (DK, DV) = g.shape, (k.shape[3], v.shape[3])
    o = torch.empty(B, 1, q.shape[2], DV, dtype=q.dtype, device=q.device)
    inputs = [view(x) for x in (q, k, v, g)]
    inputs += [inputs[-1] if x is None else view(x) for x in (s, slot)]
    GROUP = q.shape[2] // H
    config = config_for(q.device, max(DK, DV), M, half=True)
    step_kernel[(B * H,)](
        *inputs, gating, positions, keys, values, view(o), H, scale, GROUP=GROUP,
        ROWS=block(GROUP), M=M, DK=DK, DV=DV, BK=block(DK), BV=block(DV),
        GATE=gate_kind(s, slot, gating), HIDE=positions is not None, **config.step,
    )  # fmt: skip
    return o


def gate_kind(s: Tensor | None, slot: Tensor | None, gating: Gating) -> int:
    """How the kernels are to read `g`: see `blocks`."""
    if slot is not None:
        return (FUSED if gating.normalizer == 1 else TEMPERED).value
    return (DERIVED if s is None else FREE).value


def empty_like(x: Tensor) -> Tensor:
    """Room for x's gradient, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
