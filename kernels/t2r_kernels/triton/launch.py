"""From tensors to kernel launches: `forward` and `backward` of a whole operator call."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from t2r_kernels.triton.blocks import DERIVED, FREE, FUSED, TEMPERED, Gating, View
from t2r_kernels.triton.configs import MOST_SLOTS, Config, config_for
from t2r_kernels.triton.gradients import (
    gate_gradients_kernel,
    query_gradients_kernel,
    state_gradients_kernel,
    token_gradients_kernel,
)
from t2r_kernels.triton.launcher import Launch, fingerprint, run
from t2r_kernels.triton.output import output_kernel
from t2r_kernels.triton.states import chunk_states_kernel, chunk_table_kernel, scan_kernel
from t2r_kernels.triton.step import step_kernel


def block(width: int, least: int = 16) -> int:
    """The tile that `width` columns take: a power of two, at least what a tensor core multiplies."""
    return max(least, 1 << (width - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up (`triton.cdiv` is slow to call from Python)."""
    return -(a // -b)


def view(x: Tensor) -> View:
    """A `[B, T, heads, ...]` tensor as the kernels take it; copied only if its last stride is not 1."""
    strides = x.stride()
    if strides[-1] != 1 and len(strides) == 4:
        x = x.contiguous()
        strides = x.stride()
    return View(x, *strides[:3])


def launch_of(kernel, grid: tuple[int, int, int], options: dict[str, int], known: dict) -> Launch:
    """A launch with those of the known arguments that the kernel names, in its order; other options are Triton's."""
    names = kernel.arg_names
    options = {name: value for name, value in options.items() if name not in names}
    return Launch(kernel, grid, {name: known[name] for name in names}, options)


@dataclass
class Call:
    """One call of the operator: its inputs, what every kernel of it is launched with, and the launches so far.

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
    config: Config | None = None  # the table's when not given

    def __post_init__(self):
        (self.B, self.T, self.H, self.M), self.HQ = self.g.shape, self.q.shape[2]
        self.DK, self.DV = self.k.shape[3], self.v.shape[3]
        self.N = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.half = all(x.dtype == torch.bfloat16 for x in (self.q, self.k, self.v))
        self.operand = torch.bfloat16 if self.half else torch.float32
        self.launches: list[Launch] = []
        self.config = self.config or config_for(self.q.device, max(self.DK, self.DV), self.M, self.half)
        C = self.config.chunk
        # Each sequence may end in one chunk that is not full: a bound that needs no look at the lengths.
        per = cdiv(self.T, C)
        self.num_chunks = self.B * per if self.cu_seqlens is None else self.T // C + self.N
        self.inputs = {"k": view(self.k), "v": view(self.v), "g": view(self.g)}
        self.inputs["s"] = self.inputs["g"] if self.s is None else view(self.s)
        self.inputs["slot"] = self.inputs["g"] if self.slot is None else view(self.slot)
        self.inputs |= {"gating": self.gating, "T": self.T, "H": self.H, "scale": self.scale, "q": view(self.q)}
        self.shape = {
            "M": self.M, "DK": self.DK, "DV": self.DV, "C": C, "BD": self.config.block_d,
            "GATE": gate_kind(self.s, self.slot, self.gating), "PACKED": self.cu_seqlens is not None,
            "GROUP": self.HQ // self.H, "HIDE": self.offsets is not None,
            # Rows of 128 bytes: with rows of 64, Triton 3.6 reads beyond a tile of shared memory on Hopper.
            "BM": block(self.M, least=64 if self.half else 32),
            "OP": triton.language.bfloat16 if self.half else triton.language.float32, "PRECISION": self._precision(),
        }  # fmt: skip
        self.table, self.bounds = (None, None) if self.cu_seqlens is None else self._chunk_table()
        self.inputs |= {"table": self.table, "offsets": self.offsets}

    def plan(self, kernel, grid: tuple[int, int, int], options: dict, **arguments) -> None:
        """Add a launch; the kernel takes of the arguments, the call's own and the configuration what it names."""
        known = self.inputs | self.shape | options | arguments
        self.launches.append(launch_of(kernel, grid, options, known))

    def run(self, name: str, *tensors: Tensor | None) -> None:
        """Run what is planned. `tensors`: what it reads or writes beside the inputs and what was made here."""
        inputs = (self.q, self.k, self.v, self.g, self.s, self.slot, self.cu_seqlens, self.offsets)
        sizes = (self.T, self.HQ, self.H, self.M, self.DK, self.DV, self.shape["GATE"], self.shape["PRECISION"])
        run(self.launches, (name, self.config, *sizes, *map(fingerprint, inputs + tensors)), self.q.device)
        self.launches = []

    def _precision(self) -> str:
        """How fp32 operands meet the tensor cores: exactly enough for what they were before."""
        half = all(x.dtype in (torch.float16, torch.bfloat16) for x in (self.q, self.k, self.v))
        return "tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

    def _chunk_table(self) -> tuple[Tensor, Tensor]:
        device = self.q.device
        table = torch.empty(self.num_chunks, 4, dtype=torch.int32, device=device)
        bounds = torch.empty(self.N + 1, dtype=torch.int32, device=device)
        self.plan(
            chunk_table_kernel, (self.N + 1, 1, 1), {"num_warps": 4}, cu_seqlens=self.cu_seqlens, table=table,
            bounds=bounds, N=self.N, NT=self.num_chunks, BLOCK=256,
        )  # fmt: skip
        return table, bounds

    def empty_states(self) -> Tensor:
        """Room for a state a chunk, `[chunks, H, M, DK + DV]`."""
        shape = (self.num_chunks, self.H, self.M, self.DK + self.DV)
        return torch.empty(shape, dtype=self.operand, device=self.q.device)

    def chunk_states(self, **kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each chunk writes, its decay `[chunks, H, M]` fp32, and its number of bands `[chunks, H]` int32.

        `sums` and `written`, `[B, T, H, M]`, are filled for the backward pass if given.
        """
        states, device = self.empty_states(), self.q.device
        decay = torch.empty(self.num_chunks, self.H, self.M, dtype=torch.float32, device=device)
        bands = torch.empty(self.num_chunks, self.H, dtype=torch.int32, device=device)
        self.plan(
            chunk_states_kernel, (self.num_chunks, self.H, 1), self.config.states,
            states=states, decay=decay, bands=bands, KEEP=bool(kept),
            **{name: view(kept[name]) if kept else self.inputs["g"] for name in ("sums", "written")},
        )  # fmt: skip
        return states, decay, bands

    def scan(self, states: Tensor, decay: Tensor, first, last, reverse: bool = False) -> None:
        """Turn what chunks write into the state before each, in place; `first` and `last`: (keys, values) or None."""
        (first_keys, first_values), (last_keys, last_values) = first or (None, None), last or (None, None)
        blocks = cdiv(self.M * (self.DK + self.DV), self.config.scan["BLOCK"])
        self.plan(
            scan_kernel, (self.N * self.H, blocks, 1), self.config.scan, states=states, decay=decay,
            bounds=self.bounds, first_keys=first_keys, first_values=first_values, last_keys=last_keys,
            last_values=last_values, per=cdiv(self.T, self.config.chunk), REVERSE=reverse,
            HAS_FIRST=first is not None, HAS_LAST=last is not None,
        )  # fmt: skip

    def each_chunk(self, kernel, options: dict, blocks: int = 1, **arguments) -> None:
        """Launch a kernel over all chunks."""
        self.plan(kernel, (self.num_chunks, self.H, blocks), options, **arguments)

    def each_chunk_by_bands(self, kernel, options: dict, blocks: int = 1, **arguments) -> None:
        """Launch a kernel over all chunks: those that need one band, then those that need more."""
        options = options | {"HEADS": min(options["HEADS"], block(self.HQ // self.H, least=1))}
        for banded in (False, True):
            self.each_chunk(kernel, options, blocks, BANDED=banded, **arguments)


def forward(
    call: Call,
    first: tuple[Tensor, Tensor] | None,
    last: tuple[Tensor, Tensor] | None,
    lse: Tensor | None = None,  # [B, T, HQ] fp32
) -> Tensor:
    """Outputs `[B, T, HQ, DV]` in q's dtype.

    If given, `last` (keys, values) is filled with the final state, and `lse` with the log-sum-exp of each softmax.
    """
    o = torch.empty(call.B, call.T, call.HQ, call.DV, dtype=call.q.dtype, device=call.q.device)
    states, decay, bands = call.chunk_states()
    call.scan(states, decay, first, last)
    call.each_chunk_by_bands(
        output_kernel, call.config.output, o=view(o), lse=view(o if lse is None else lse), states=states, bands=bands,
        LSE=lse is not None,
    )  # fmt: skip
    call.run("forward", *(first or (None, None)), *(last or (None, None)), lse)
    return o


def backward(
    call: Call,
    do: Tensor,  # [B, T, HQ, DV]
    first: tuple[Tensor, Tensor] | None,
    d_last: tuple[Tensor, Tensor] | None,
    d_lse: Tensor | None = None,  # [B, T, HQ]
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
    blocks = cdiv(max(call.DK, call.DV), call.config.block_d)

    states, decay, bands = call.chunk_states(sums=sums, written=written)
    call.scan(states, decay, first, None)
    found = {"sums": view(sums), "written": view(written), "bands": bands, "rows": view(rows), "states": states}
    scratch = {"weights": view(weights), "d_logits": view(d_logits), "do": view(do)}
    call.each_chunk_by_bands(
        query_gradients_kernel, call.config.queries, blocks, **scratch, **found, dq=view(dq),
        d_lse=view(do if d_lse is None else d_lse), LSE=d_lse is not None,
    )  # fmt: skip
    found |= {"columns": view(columns), "dk": view(dk), "dv": view(dv), "d_states": call.empty_states()}
    call.each_chunk_by_bands(token_gradients_kernel, call.config.tokens, blocks, **scratch, **found)
    call.scan(found["d_states"], decay, d_last, d_first, reverse=True)
    call.run("backward", do, *(first or (None, None)), *(d_last or (None, None)), d_lse)
    del weights, d_logits, scratch

    through, kept = torch.empty(shape, **fp32), torch.empty_like(decay)
    found |= {"through": view(through), "kept": kept, "decay": decay}
    call.each_chunk(state_gradients_kernel, call.config.through, blocks, **found)
    slices = cdiv(call.M, call.config.gates["BS"])
    call.each_chunk(
        gate_gradients_kernel, call.config.gates, slices, **found, dg=view(dg), ds=view(dg if ds is None else ds)
    )
    call.run("after")
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
    config: Config | None = None,  # the table's when not given
    lse: Tensor | None = None,  # [B, 1, HQ] fp32, to be filled
) -> Tensor:
    """Output `[B, 1, HQ, DV]` of one token, in one launch; the state is updated in place."""
    (B, _, H, M), (DK, DV) = g.shape, (k.shape[3], v.shape[3])
    o = torch.empty(B, 1, q.shape[2], DV, dtype=q.dtype, device=q.device)
    GROUP = q.shape[2] // H
    config = config or config_for(q.device, max(DK, DV), min(M, MOST_SLOTS), half=True)
    known = config.step | {
        "q": view(q), "k": view(k), "v": view(v), "g": view(g), "s": view(g if s is None else s),
        "slot": view(g if slot is None else slot), "gating": gating, "positions": positions, "keys": keys,
        "values": values, "o": view(o), "H": H, "scale": scale, "GROUP": GROUP, "ROWS": block(GROUP), "M": M, "DK": DK,
        "DV": DV, "BK": block(DK), "BV": block(DV), "GATE": gate_kind(s, slot, gating), "HIDE": positions is not None,
        "lse": view(o if lse is None else lse), "LSE": lse is not None,
    }  # fmt: skip
    tensors = (q, k, v, g, s, slot, positions, keys, values, lse)
    key = ("step", config, GROUP, H, M, DK, DV, known["GATE"], *map(fingerprint, tensors))
    run([launch_of(step_kernel, (B * H, 1, 1), config.step, known)], key, q.device)
    return o


def gate_kind(s: Tensor | None, slot: Tensor | None, gating: Gating) -> int:
    """How the kernels are to read `g`: see `blocks`."""
    if slot is not None:
        return (FUSED if gating.normalizer == 1 else TEMPERED).value
    return (DERIVED if s is None else FREE).value


def empty_like(x: Tensor) -> Tensor:
    """Room for x's gradient, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
