"""The kernels as PyTorch functions: known to autograd, `torch.compile` and activation checkpointing.

Compiled code calls them as registered operators. Eager code calls the same functions without the dispatcher, which
would cost more than some of the kernels.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from t2r_kernels.triton import launch
from t2r_kernels.triton.blocks import Gating


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    slot: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    write_logit: float,
    keep_logit: float,
    normalizer: float,
    output_final_state: bool,
    output_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch.forward`: outputs, and final keys and values and log-sum-exp (empty unless asked for)."""
    call = _call(q, k, v, g, s, slot, cu_seqlens, offsets, scale, write_logit, keep_logit, normalizer)
    last, lse = _final_state(k, v, g, cu_seqlens, output_final_state), _lse(q, output_lse)
    o = launch.forward(call, _pair(keys, values), last if output_final_state else None, lse if output_lse else None)
    return o, *last, lse


gsa_op = custom_op("t2r::gsa", _forward, mutates_args=())


@gsa_op.register_fake
def _(
    q, k, v, g, s, slot, keys, values, cu_seqlens, offsets, scale, write, keep, normalizer, output_final_state,
    output_lse,
):  # fmt: skip
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, *_final_state(k, v, g, cu_seqlens, output_final_state), _lse(q, output_lse)


def _gradients(
    do: Tensor,
    d_keys: Tensor | None,
    d_values: Tensor | None,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    slot: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    write_logit: float,
    keep_logit: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`launch.backward`: gradients of q, k, v, g, s and the initial keys and values (empty for what was not given)."""
    call = _call(q, k, v, g, s, slot, cu_seqlens, offsets, scale, write_logit, keep_logit, normalizer)
    *grads, ds, d_first = launch.backward(call, do, _pair(keys, values), _pair(d_keys, d_values), d_lse)
    ds = _nothing(q) if ds is None else ds
    return *grads, ds, *((_nothing(q), _nothing(q)) if d_first is None else d_first)


gsa_backward_op = custom_op("t2r::gsa_backward", _gradients, mutates_args=())


@gsa_backward_op.register_fake
def _(
    do, d_keys, d_values, d_lse, q, k, v, g, s, slot, keys, values, cu_seqlens, offsets, scale, write, keep, normalizer
):  # fmt: skip
    return tuple(_nothing(q) if x is None else launch.empty_like(x) for x in (q, k, v, g, s, keys, values))


def _save(ctx, inputs, output):
    *tensors, scale, write_logit, keep_logit, normalizer, output_final_state, output_lse = inputs
    ctx.save_for_backward(*tensors)
    ctx.scalars = scale, write_logit, keep_logit, normalizer
    ctx.output_final_state, ctx.output_lse = output_final_state, output_lse
    ctx.set_materialize_grads(False)


def _backward(ctx, do, d_keys, d_values, d_lse, gradients=gsa_backward_op):
    q, k, v, g, s, slot, keys, values, cu_seqlens, offsets = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    final = (None, None)
    if ctx.output_final_state and (d_keys is not None or d_values is not None):
        n, (_, _, H, M) = (q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1), g.shape
        d_keys = q.new_zeros(n, H, M, k.shape[3], dtype=torch.float32) if d_keys is None else d_keys.contiguous()
        d_values = q.new_zeros(n, H, M, v.shape[3], dtype=torch.float32) if d_values is None else d_values.contiguous()
        final = d_keys, d_values
    dq, dk, dv, dg, ds, dk0, dv0 = gradients(
        do, *final, d_lse if ctx.output_lse else None, q, k, v, g, s, slot, keys, values, cu_seqlens, offsets,
        *ctx.scalars,
    )  # fmt: skip
    given = (dq, dk, dv, dg, None if s is None else ds, None)
    state = (None, None) if keys is None else (dk0, dv0)
    return *given, *state, *(None,) * 8


gsa_op.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        _save(ctx, arguments, None)
        return _forward(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        return _backward(ctx, *gradients, gradients=_gradients)


def whole(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gsa_op`, by the shortest way."""
    return gsa_op(*arguments) if torch.compiler.is_compiling() else _Eager.apply(*arguments)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    slot: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    values: Tensor,
    lse: Tensor | None,
    scale: float,
    write_logit: float,
    keep_logit: float,
    normalizer: float,
) -> Tensor:
    """`launch.step`: the output; keys and values are updated in place, lse is filled."""
    gating = Gating(float(write_logit), float(keep_logit), float(normalizer), 1 / normalizer)
    return launch.step(q, k, v, g, s, slot, positions, keys, values, float(scale), gating, lse=lse)


gsa_step_op = custom_op("t2r::gsa_step", _step, mutates_args=("keys", "values", "lse"))


@gsa_step_op.register_fake
def _(q, k, v, g, s, slot, positions, keys, values, lse, scale, write_logit, keep_logit, normalizer):
    return q.new_empty(*q.shape[:3], v.shape[3])


def token(*arguments) -> Tensor:
    """`gsa_step_op`, by the shortest way."""
    return gsa_step_op(*arguments) if torch.compiler.is_compiling() else _step(*arguments)


def _call(q, k, v, g, s, slot, cu_seqlens, offsets, scale, write_logit, keep_logit, normalizer) -> launch.Call:
    gating = Gating(float(write_logit), float(keep_logit), float(normalizer), 1 / normalizer)
    return launch.Call(q, k, v, g, s, slot, cu_seqlens, offsets, float(scale), gating)


def _final_state(k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
    if not wanted:
        return _nothing(k), _nothing(k)
    n = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (n, g.shape[2], g.shape[3])
    return tuple(x.new_empty(*shape, x.shape[3], dtype=torch.float32) for x in (k, v))


def _lse(q: Tensor, wanted: bool) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32) if wanted else _nothing(q)


def _pair(keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if keys is None else (keys.contiguous(), values.contiguous())


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)
