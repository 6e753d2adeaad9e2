"""Softmax attention of packed documents, each by itself, where torch has flash attention for it."""

from inspect import signature

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .configuration_t2r import T2RConfig
from .positions import Positions

# Torch 2.11 takes fewer key/value heads as they come, later versions when told to.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def attends_by_document(x: Tensor, positions: Positions, config: T2RConfig) -> bool:
    """Whether `attend_by_document` can take the place of attention to all packed tokens under a mask.

    Args:
        x: any tensor of the pass, for device and dtype.
        positions: of the pass.
        config: of the model.
    """
    return (
        positions.cu_seqlens is not None
        and x.is_cuda
        and _compute_dtype(x) in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and config._attn_implementation == "sdpa"
        and config.head_dim <= 256
        and config.head_dim % 8 == 0
        and not config.attention_dropout
    )


def attend_by_document(q: Tensor, k: Tensor, v: Tensor, positions: Positions, window: int | None) -> Tensor:
    """Causal softmax attention within each packed document.

    Args:
        q: `[1, T, HQ, D]`, rotated.
        k: `[1, T, H, D]`, rotated.
        v: `[1, T, H, D]`.
        positions: with the documents' bounds.
        window: tokens that a token attends to, itself included; None for all before it.

    Returns:
        `[1, T, HQ, D]`.
    """
    q, k, v = (x[0].to(_compute_dtype(x)) for x in (q, k, v))
    bounds, longest = positions.cu_seqlens, positions.longest
    left = -1 if window is None else window - 1
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(left, 0), **GROUPED)[None]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
