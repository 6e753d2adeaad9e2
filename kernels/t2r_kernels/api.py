"""`gsa` and `gsa_step`: one signature for every backend, arguments checked before any of them runs."""

import logging
from functools import cache

import torch
from torch import Tensor

from t2r_kernels.chunk import chunk_gsa
from t2r_kernels.naive import naive_gsa
from t2r_kernels.state import SlotState, zero_state
from t2r_kernels.step import step

logger = logging.getLogger(__name__)

BACKENDS = {"naive": naive_gsa, "torch": chunk_gsa}


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    s: Tensor | None = None,
    scale: float | None = None,
    initial_state: SlotState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    hide_unwritten: bool = False,
    position_offset: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SlotState | None]:
    """Gated Slot Attention over whole sequences (arXiv 2409.07146, equations 9 to 11).

    With `α = exp(g)`, per key/value head: slot keys `K ← diag(α) K + s kᵀ`, slot values `V ← diag(α) V + s vᵀ`,
    output `o = Vᵀ softmax(scale · K q)`. Differentiable in every tensor and in the initial state.

    Args:
        q: queries, `[B, T, HQ, D]`; `HQ` is a multiple of `H`, query head i reads key/value head `i // (HQ // H)`.
        k: keys, `[B, T, H, D]`.
        v: values, `[B, T, H, Dv]`.
        g: log forget gates, `[B, T, H, M]`, at most 0 (0 keeps for ever, -30 overwrites).
        s: write strengths, `[B, T, H, M]`; `-expm1(g)` when not given.
        scale: factor on the logits; `D ** -0.5` when not given.
        initial_state: slot keys `[N, H, M, D]` and values `[N, H, M, Dv]`; zeros when not given.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integer bounds of packed sequences, from 0 to T; requires `B == 1`. Without it N = B.
        hide_unwritten: slot i takes no part in the softmax before position i of its own sequence.
        position_offset: position of each sequence's first token, an integer or `[N]`; negative for left padding.
            Only `hide_unwritten` reads it. 0 when not given.
        backend: "naive", "torch", or "auto" for the fastest that runs here.

    Returns:
        Outputs `[B, T, HQ, Dv]` in `q`'s dtype, and the final `SlotState` (or None).

    Raises:
        ValueError: a shape, a bound or the backend's name is wrong.
    """
    _check_shapes(q, k, v, g, s)
    n = _count_sequences(q, cu_seqlens)
    dtype = _accumulation_dtype(q, k, v, g)
    state = _check_state(initial_state, n, k, v, g.shape[-1], dtype)
    run = BACKENDS[resolve_backend(backend, q.device.type)]
    with torch.autocast(q.device.type, enabled=False):  # the recurrence is fp32 even where the layers are not
        o, final = run(
            *(x.to(dtype) for x in (q, k, v, g)),
            _write_strength(g, dtype) if s is None else s.to(dtype),
            q.shape[-1] ** -0.5 if scale is None else scale,
            state,
            cu_seqlens,
            hide_unwritten,
            _offsets(position_offset, n, q.device),
        )
    return o.to(q.dtype), final if output_final_state else None


@torch.no_grad()
def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: SlotState | tuple[Tensor, Tensor],
    *,
    s: Tensor | None = None,
    scale: float | None = None,
    hide_unwritten: bool = False,
    position_offset: int | Tensor | None = None,
) -> tuple[Tensor, SlotState]:
    """One token of `gsa` for each of B sequences, for decoding: the state is updated in place, without gradients.

    Args:
        q: `[B, 1, HQ, D]`. `k`, `v`, `g`, `s`, `scale`, `hide_unwritten`: as for `gsa`, with T = 1.
        k: `[B, 1, H, D]`.
        v: `[B, 1, H, Dv]`.
        g: `[B, 1, H, M]`.
        state: slot keys `[B, H, M, D]` and values `[B, H, M, Dv]`, fp32 (fp64 for fp64 inputs); overwritten.
        s: `[B, 1, H, M]` or None.
        scale: factor on the logits; `D ** -0.5` when not given.
        hide_unwritten: slot i takes no part in the softmax before position i.
        position_offset: position of this token, an integer or `[B]`.

    Returns:
        Output `[B, 1, HQ, Dv]` in `q`'s dtype, and the same state.

    Raises:
        ValueError: a shape or the state's dtype is wrong, or `hide_unwritten` is set without the position.
    """
    _check_shapes(q, k, v, g, s)
    B, T, _, D = q.shape
    if T != 1:
        raise ValueError(f"gsa_step takes one token, got T = {T}; use gsa for whole sequences")
    if hide_unwritten and position_offset is None:
        raise ValueError("gsa_step with hide_unwritten needs position_offset, the position of this token")
    dtype = _accumulation_dtype(q, k, v, g)
    if any(x.dtype != dtype for x in state):
        raise ValueError(f"gsa_step updates the state in place, so it must be {dtype}, got {state[0].dtype}")
    state = _check_state(state, B, k, v, g.shape[-1], dtype)
    with torch.autocast(q.device.type, enabled=False):
        o = step(
            *(x[:, 0].to(dtype) for x in (q, k, v, g)),
            (_write_strength(g, dtype) if s is None else s.to(dtype))[:, 0],
            D**-0.5 if scale is None else scale,
            state,
            _offsets(position_offset, B, q.device) if hide_unwritten else None,
        )
    return o.to(q.dtype).unsqueeze(1), state


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that `backend` stands for on a device of this type ("cpu", "cuda", ...).

    Raises:
        ValueError: no backend has this name.
    """
    if backend == "auto":
        _say_once(device_type)
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(['auto', *BACKENDS])}")
    return backend


@cache
def _say_once(device_type: str) -> None:
    logger.info("gsa: backend 'torch' on %s", device_type)


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _write_strength(g: Tensor, dtype: torch.dtype) -> Tensor:
    return -torch.expm1(g.to(dtype))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None) -> None:
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


def _count_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        return q.shape[0]
    if q.shape[0] != 1:
        raise ValueError(f"gsa: packed sequences (cu_seqlens) need batch size 1, got {q.shape[0]}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"gsa: cu_seqlens must rise from 0 to {q.shape[1]}, got {bounds}")
    return len(bounds) - 1


def _check_state(state, n: int, k: Tensor, v: Tensor, num_slots: int, dtype: torch.dtype) -> SlotState:
    if state is None:
        return zero_state(n, k, v, num_slots, dtype)
    state = SlotState(*(x.to(dtype) for x in state))
    for name, x, width in (("keys", state.keys, k.shape[3]), ("values", state.values, v.shape[3])):
        expected = (n, k.shape[2], num_slots, width)
        if x.shape != expected:
            raise ValueError(f"gsa: slot {name} must have shape {list(expected)}, got {list(x.shape)}")
    return state


def _offsets(position_offset: int | Tensor | None, n: int, device: torch.device) -> Tensor:
    offset = 0 if position_offset is None else position_offset
    return torch.as_tensor(offset, device=device).expand(n)
