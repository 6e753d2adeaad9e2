"""A softmax window beside the slots (layer type "hybrid_sliding"): attention to it, and the way through it.

A token comes into the window and leaves it `window` tokens later; only then is it written into slots. So slots and
window never hold the same token, and one softmax over both is attention to all that either holds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tokens(NamedTuple):
    """What of some tokens is attended to, and then written into slots.

    Attributes:
        keys: rotated, `[B, T, H, D]`.
        values: `[B, T, H, D]`.
        logits: of their gates, `[B, T, H, M]`.
        slots: that they take over, `[B, T, H]`.
    """

    keys: Tensor
    values: Tensor
    logits: Tensor
    slots: Tensor

    def after(self, past: "Tokens | None", window: int) -> "Tokens":
        """These tokens behind the `window` that came before them (zeros where nothing did): `[B, window + T, ...]`."""
        if past is None:
            return Tokens(*(F.pad(x, (0, 0) * (x.ndim - 2) + (window, 0)) for x in self))
        return Tokens(*(torch.cat(pair, 1) for pair in zip(past, self, strict=True)))

    def leaving(self, ids: Tensor, padding: Tensor | None = None) -> "Tokens":
        """Of `[B, window + T, ...]`, those that leave the window as T tokens come: `[B, T, ...]`.

        Args:
            ids: position of each token that comes in its own document, `[B, T]`. To begin with, nothing leaves.
            padding: True where no token comes, `[B, T]`: nothing leaves there either.
        """
        T = ids.shape[1]
        gone = Tokens(*(x[:, :T] for x in self))
        nothing = ids < self.keys.shape[1] - T
        nothing = nothing if padding is None else nothing | padding
        return gone._replace(slots=gone.slots.masked_fill(nothing.unsqueeze(-1), -1))

    def last(self, window: int, padding: Tensor | None = None) -> "Tokens":
        """Of `[B, window + T, ...]` the last `window` tokens, in memory of their own.

        Args:
            window: how many.
            padding: True where no token came, `[B, T]`. What is behind a sequence's last token counts for nothing.
        """
        if padding is None:
            return Tokens(*(x[:, -window:].clone() for x in self))
        place = torch.arange(padding.shape[1], device=padding.device) + 1
        ends = place.masked_fill(padding, 0).amax(-1, keepdim=True)  # [B, 1]
        last = ends + torch.arange(window, device=padding.device)  # [B, window]
        row = torch.arange(len(last), device=padding.device)[:, None]
        return Tokens(*(x[row, last] for x in self))


def window_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of each token to the last `window` tokens of its document, itself included.

    Queries go by blocks of at most `window`, so that memory is linear in their number.

    Args:
        q: rotated, `[B, T, HQ, D]`.
        k: rotated, `[B, window + T, H, D]`: of the `window` tokens before the first query too.
        v: `[B, window + T, H, D]`.
        ids: position of each query in its document, `[B, T]`.

    Returns:
        Outputs `[B, T, HQ, D]` and the log-sum-exp of each softmax, `[B, T, HQ]`, both fp32 (fp64 for fp64 inputs).
    """
    (B, T, HQ, D), H = q.shape, k.shape[2]
    window = k.shape[1] - T
    C = min(window, T)
    n = -(-T // C)  # blocks
    missing = n * C - T
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        k, v = (F.pad(x.to(dtype), (0, 0, 0, 0, 0, missing)).unfold(1, window + C, C) for x in (k, v))
        q = F.pad(q.to(dtype) * D**-0.5, (0, 0, 0, 0, 0, missing)).view(B, n, C, H, HQ // H, D)
        logits = q.permute(0, 1, 3, 2, 4, 5).flatten(3, 4) @ k  # [B, n, H, C * HQ/H, window + C]
        ahead = window + torch.arange(C, device=q.device)[:, None] - torch.arange(window + C, device=q.device)
        # A document has as many tokens before a query as its position says.
        seen = (ahead >= 0) & (ahead < window) & (ahead <= F.pad(ids, (0, missing)).view(B, n, C, 1))
        hidden = ~seen.repeat_interleave(HQ // H, 2).unsqueeze(2)  # [B, n, 1, C * HQ/H, window + C]
        logits = logits.masked_fill(hidden, float("-inf"))
        o = logits.softmax(-1) @ v.mT  # [B, n, H, C * HQ/H, D]
        lse = logits.logsumexp(-1)
    return _in_order(o, T, C), _in_order(lse, T, C)


def joined(o: Tensor, lse: Tensor, o_window: Tensor, lse_window: Tensor) -> Tensor:
    """The output of one softmax over slots and window, from those of each: `[B, T, HQ, D]` in o's dtype.

    Args:
        o: of the slots, `[B, T, HQ, D]`.
        lse: of the slots' softmax, `[B, T, HQ]`; -inf where nothing has been written.
        o_window: as `o`, of the window.
        lse_window: as `lse`.
    """
    share = torch.sigmoid(lse - lse_window).unsqueeze(-1)  # e^lse / (e^lse + e^lse_window)
    return torch.lerp(o_window, o.to(o_window.dtype), share).to(o.dtype)


def _in_order(x: Tensor, T: int, C: int) -> Tensor:
    """`[B, n, H, C * HQ/H, ...]` to `[B, T, HQ, ...]`."""
    return x.unflatten(3, (C, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :T]
