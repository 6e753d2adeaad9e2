"""`gsa` and `gsa_step`: one signature for every backend, arguments checked before any of them runs."""

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

from t2r_kernels.chunk import chunk_gsa
from t2r_kernels.gate import Gate, log_gate
from t2r_kernels.naive import naive_gsa
from t2r_kernels.state import SlotState, zero_state
from t2r_kernels.step import step

logger = logging.getLogger(__name__)

# Where Triton compiles (a CUDA build of PyTorch), or interprets its kernels on the CPU, slowly, to test them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ops = pieces = None
if importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.version.cuda is not None):
    from t2r_kernels.triton import ops, pieces
HAS_TRITON = ops is not None  # never in the copy that a saved model brings along

REFERENCE = {"naive": naive_gsa, "torch": chunk_gsa}
BACKENDS = (*REFERENCE, "triton")
MAX_WIDTH = 256  # of heads that the triton backend takes: its table of configurations goes up to here


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    s: Tensor | None = None,
    gate: Gate | None = None,
    scale: float | None = None,
    initial_state: SlotState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    hide_unwritten: bool = False,
    position_offset: int | Tensor | None = None,
    output_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SlotState | None] | tuple[Tensor, SlotState | None, Tensor]:
    """Gated Slot Attention over whole sequences (arXiv 2409.07146, equations 9 to 11).

    With `α = exp(g)`, per key/value head: slot keys `K ← diag(α) K + s kᵀ`, slot values `V ← diag(α) V + s vᵀ`,
    output `o = Vᵀ softmax(scale · K q)`. Differentiable in every tensor and in the initial state.

    Args:
        q: queries, `[B, T, HQ, D]`; `HQ` is a multiple of `H`, query head i reads key/value head `i // (HQ // H)`.
        k: keys, `[B, T, H, D]`.
        v: values, `[B, T, H, Dv]`.
        g: log forget gates, `[B, T, H, M]`, at most 0 (0 keeps for ever, -30 overwrites); with `gate`, logits.
        s: write strengths, `[B, T, H, M]`; `-expm1(g)` when not given.
        gate: how the logits `g` become log gates; without it, `g` holds log gates.
        scale: factor on the logits; `D ** -0.5` when not given.
        initial_state: slot keys `[N, H, M, D]` and values `[N, H, M, Dv]`; zeros when not given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integer bounds of packed sequences, from 0 to T; requires `B == 1`. Without it N = B.
            On a GPU their values are taken as they are: to check them would be to wait for the device.
        hide_unwritten: slot i takes no part in the softmax before position i of its own sequence.
        position_offset: position of each sequence's first token, an integer or `[N]`; negative for left padding.
            Only `hide_unwritten` reads it. 0 when not given.
        output_lse: whether to return the log-sum-exp of each softmax over slots too, with which its output can be
            joined with that of another softmax into one over both.
        backend: "naive", "torch", "triton", or "auto" for the fastest that runs here: triton on CUDA where it takes
            these dtypes and sizes, torch elsewhere.

    Returns:
        Outputs `[B, T, HQ, Dv]` in `q`'s dtype, and the final `SlotState` (or None). Under autocast the triton backend
        reads q, k and v in autocast's dtype, and its outputs have it, as with PyTorch's softmax attention; gates and
        state are fp32 all the same. With `output_lse` also `log Σ exp(scale · K q)` over the slots that take part,
        `[B, T, HQ]` in the state's dtype; where none does (`hide_unwritten` before position 0), it is -inf and has no
        gradient, and the output is slot 0's.

    Raises:
        ValueError: a shape, a bound or the backend's name is wrong, or the backend does not take these tensors.
    """
    _check_shapes(q, k, v, g, s, gate)
    n = _count_sequences(q, cu_seqlens)
    dtype = _accumulation_dtype(q, k, v, g)
    state = _check_state(initial_state, n, k, v, g.shape[-1], dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve_backend(backend, q.device.type, _refusal(q, k, v, g))
    offsets = _offsets(position_offset, n, q.device) if hide_unwritten or backend != "triton" else None
    if backend == "triton" and q.shape[1]:
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        o, keys, values, lse = pieces.whole(
            q, k, v, g, s, None if gate is None else gate.slot, *(state or (None, None)), cu_seqlens, offsets, scale,
            *_gate_scalars(gate), output_final_state, output_lse,
        )  # fmt: skip
        final = SlotState(keys, values) if output_final_state else None
        return (o, final, lse) if output_lse else (o, final)
    with torch.autocast(q.device.type, enabled=False):  # the recurrence is fp32 even where the layers are not
        g = (g if gate is None else log_gate(g, gate)).to(dtype)
        o, final, lse = REFERENCE.get(backend, chunk_gsa)(
            *(x.to(dtype) for x in (q, k, v)),
            g,
            -torch.expm1(g) if s is None else s.to(dtype),
            scale,
            zero_state(n, k, v, g.shape[-1], dtype) if state is None else state,
            cu_seqlens,
            hide_unwritten,
            _offsets(position_offset, n, q.device),
            output_lse,
        )
    o, final = o.to(q.dtype), final if output_final_state else None
    return (o, final, lse) if output_lse else (o, final)


@torch.no_grad()
def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: SlotState | tuple[Tensor, Tensor],
    *,
    s: Tensor | None = None,
    gate: Gate | None = None,
    scale: float | None = None,
    hide_unwritten: bool = False,
    position_offset: int | Tensor | None = None,
    output_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, SlotState] | tuple[Tensor, SlotState, Tensor]:
    """One token of `gsa` for each of B sequences, for decoding: the state is updated in place, without gradients.

    Args:
        q: `[B, 1, HQ, D]`. `k`, `v`, `g`, `s`, `gate`, `scale`, `hide_unwritten`: as for `gsa`, with T = 1.
        k: `[B, 1, H, D]`.
        v: `[B, 1, H, Dv]`.
        g: `[B, 1, H, M]`.
        state: slot keys `[B, H, M, D]` and values `[B, H, M, Dv]`, fp32 (fp64 for fp64 inputs); overwritten.
        s: `[B, 1, H, M]` or None.
        gate: with `slot` `[B, 1, H]`, or None.
        scale: factor on the logits; `D ** -0.5` when not given.
        hide_unwritten: slot i takes no part in the softmax before position i.
        position_offset: position of this token, an integer or `[B]`.
        output_lse: as for `gsa`.
        backend: "torch", "triton" (one launch) or "auto", as for `gsa`.

    Returns:
        Output `[B, 1, HQ, Dv]` in `q`'s dtype, and the same state; with `output_lse` also `[B, 1, HQ]`, as for `gsa`.

    Raises:
        ValueError: a shape, the state's dtype or the backend is wrong, or `hide_unwritten` comes without the position.
    """
    _check_shapes(q, k, v, g, s, gate)
    B, T, _, D = q.shape
    if T != 1:
        raise ValueError(f"gsa_step takes one token, got T = {T}; use gsa for whole sequences")
    if hide_unwritten and position_offset is None:
        raise ValueError("gsa_step with hide_unwritten needs position_offset, the position of this token")
    dtype = _accumulation_dtype(q, k, v, g)
    if any(x.dtype != dtype for x in state):
        raise ValueError(f"gsa_step updates the state in place, so it must be {dtype}, got {state[0].dtype}")
    state = _check_state(state, B, k, v, g.shape[-1], dtype)
    scale = D**-0.5 if scale is None else scale
    refusal = _refusal(q, k, v, g)
    if not all(x.is_contiguous() for x in state):
        refusal = refusal or "a state that is not contiguous"
    backend = resolve_backend(backend, q.device.type, refusal)
    positions = _offsets(position_offset, B, q.device) if hide_unwritten else None
    lse = q.new_empty(B, 1, q.shape[2], dtype=dtype) if output_lse else None
    if backend == "triton":
        o = ops.token(
            q, k, v, g, s, None if gate is None else gate.slot, positions, *state, lse, scale, *_gate_scalars(gate)
        )
        return (o, state, lse) if output_lse else (o, state)
    with torch.autocast(q.device.type, enabled=False):
        g = (g if gate is None else log_gate(g, gate)).to(dtype)
        o = step(
            *(x[:, 0].to(dtype) for x in (q, k, v)),
            g[:, 0],
            (-torch.expm1(g) if s is None else s.to(dtype))[:, 0],
            scale,
            state,
            positions,
            lse[:, 0] if output_lse else None,
        )
    o = o.to(q.dtype).unsqueeze(1)
    return (o, state, lse) if output_lse else (o, state)


def resolve_backend(backend: str, device_type: str, refusal: str | None = None) -> str:
    """The backend that `backend` stands for on a device of this type ("cpu", "cuda", ...).

    Args:
        backend: a name from `BACKENDS`, or "auto".
        device_type: where the tensors are.
        refusal: what about them the triton backend does not take, if anything.

    Raises:
        ValueError: no backend has this name, or triton is asked for where it does not run.
    """
    if backend == "auto":
        backend = "triton" if HAS_TRITON and device_type == "cuda" and refusal is None else "torch"
        if not torch.compiler.is_compiling():
            _say_once(backend, device_type, refusal)
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(['auto', *BACKENDS])}")
    if backend == "triton":
        if not (HAS_TRITON and (INTERPRETED or device_type == "cuda")):
            raise ValueError(f"backend 'triton' needs the package triton and tensors on CUDA, not on {device_type!r}")
        if refusal is not None:
            raise ValueError(f"backend 'triton' does not take {refusal}; use 'torch'")
    return backend


def takes_triton(head_dim: int) -> bool:
    """Whether "auto" is triton on CUDA for heads this wide (fp64 aside)."""
    return HAS_TRITON and head_dim <= MAX_WIDTH


@cache
def _say_once(backend: str, device_type: str, refusal: str | None) -> None:
    why = f" ({refusal} is not for triton)" if refusal and device_type == "cuda" else ""
    logger.info("gsa: backend %r on %s%s", backend, device_type, why)


def _refusal(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """What the triton backend does not take about these tensors."""
    if any(x.dtype == torch.float64 for x in (q, k, v, g)):
        return "fp64"
    return f"heads wider than {MAX_WIDTH}" if max(k.shape[3], v.shape[3]) > MAX_WIDTH else None


def _gate_scalars(gate: Gate | None) -> tuple[float, float, float]:
    return (0.0, 0.0, 1.0) if gate is None else tuple(float(x) for x in gate[1:])


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None, gate: Gate | None) -> None:
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkvg", (q, k, v, g), strict=True))
    if any(x.ndim != 4 for x in (q, k, v, g)):
        raise ValueError(f"gsa takes [batch, time, heads, width] tensors, got {shapes}")
    if any(x.shape[:2] != q.shape[:2] for x in (k, v, g)):
        raise ValueError(f"gsa: q, k, v and g must share batch and time, got {shapes}")
    if any(x.shape[2] != k.shape[2] for x in (v, g)) or q.shape[3] != k.shape[3]:
        raise ValueError(f"gsa: k, v and g must share heads, q and k their width, got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"gsa: {q.shape[2]} query heads do not divide into {k.shape[2]} key/value heads")
    if s is not None and s.shape != g.shape:
        raise ValueError(f"gsa: s must have g's shape {list(g.shape)}, got {list(s.shape)}")
    if gate is not None and s is not None:
        raise ValueError("gsa: with gate, write strengths follow from the logits; give either gate or s")
    if gate is not None and (gate.slot.shape != g.shape[:3] or gate.slot.dtype != torch.int32):
        raise ValueError(
            f"gsa: gate.slot must be int32 of shape {list(g.shape[:3])}, got {gate.slot.dtype}, {list(gate.slot.shape)}"
        )


def _count_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        return q.shape[0]
    if q.shape[0] != 1:
        raise ValueError(f"gsa: packed sequences (cu_seqlens) need batch size 1, got {q.shape[0]}")
    if cu_seqlens.device.type != "cpu":
        return cu_seqlens.shape[0] - 1
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"gsa: cu_seqlens must rise from 0 to {q.shape[1]}, got {bounds}")
    return len(bounds) - 1


def _check_state(state, n: int, k: Tensor, v: Tensor, num_slots: int, dtype: torch.dtype) -> SlotState | None:
    if state is None:
        return None
    state = SlotState(*(x.to(dtype) for x in state))
    for name, x, width in (("keys", state.keys, k.shape[3]), ("values", state.values, v.shape[3])):
        expected = (n, k.shape[2], num_slots, width)
        if x.shape != expected:
            raise ValueError(f"gsa: slot {name} must have shape {list(expected)}, got {list(x.shape)}")
    return state


def _offsets(position_offset: int | Tensor | None, n: int, device: torch.device) -> Tensor:
    if isinstance(position_offset, Tensor):
        return position_offset.to(device).expand(n).contiguous()
    return torch.full((n,), position_offset or 0, device=device)
