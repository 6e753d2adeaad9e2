"""The recurrent state of Gated Slot Attention."""

from typing import NamedTuple

import torch
from torch import Tensor


class SlotState(NamedTuple):
    """What a sequence leaves behind: one bounded memory per key/value head.

    Attributes:
        keys: slot keys, `[N, H, M, D]`, fp32 (fp64 for fp64 inputs).
        values: slot values, `[N, H, M, Dv]`, same dtype.
    """

    keys: Tensor
    values: Tensor


def zero_state(n: int, k: Tensor, v: Tensor, num_slots: int, dtype: torch.dtype) -> SlotState:
    """An empty memory for `n` sequences with the heads and widths of `k` and `v` (`[B, T, H, D]`)."""
    shape = (n, k.shape[2], num_slots)
    return SlotState(
        keys=k.new_zeros(*shape, k.shape[3], dtype=dtype),
        values=v.new_zeros(*shape, v.shape[3], dtype=dtype),
    )
