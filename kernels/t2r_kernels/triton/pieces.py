"""More slots than the kernels take at once: a softmax over some slots at a time, and then one over all.

Slots meet in the softmax alone. So they are cut into pieces, and the log-sum-exp of each is all that it takes to join
the outputs.
"""

import torch
from torch import Tensor

from t2r_kernels.triton import ops
from t2r_kernels.triton.configs import MOST_SLOTS

NO_SLOT = 2**30  # of a piece: what a token takes over is elsewhere


def whole(
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
    *more: float | bool,  # scale, write_logit, keep_logit, normalizer, output_final_state, output_lse
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.whole` of any number of slots."""
    pieces = -(-g.shape[3] // MOST_SLOTS)
    if pieces <= 1:
        return ops.whole(q, k, v, g, s, slot, keys, values, cu_seqlens, offsets, *more)
    parts = [[None] * pieces if x is None else x.tensor_split(pieces, 3) for x in (g, s)]
    parts += [[None] * pieces if x is None else x.tensor_split(pieces, 2) for x in (keys, values)]
    results, first = [], 0
    for piece, strengths, *state in zip(*parts, strict=True):
        taken = None if slot is None else _from(first, slot)
        since = None if offsets is None else offsets - first
        results.append(ops.whole(q, k, v, piece, strengths, taken, *state, cu_seqlens, since, *more[:-1], True))
        first += piece.shape[3]
    outputs, keys, values, lse = zip(*results, strict=True)
    o, lse = _joined(outputs, torch.stack(lse))
    return o, _together(keys), _together(values), lse if more[-1] else lse.new_empty(0)


def _from(first: int, slot: Tensor) -> Tensor:
    """Slots `[B, T, H]` counted from `first`; a negative one stays, since it marks a place without a token."""
    return slot if first == 0 else torch.where(slot < 0, slot, torch.where(slot < first, NO_SLOT, slot - first))


def _joined(outputs: tuple[Tensor, ...], lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the softmax over all pieces, and its log-sum-exp, from those of each: `lse` is `[P, B, T, HQ]`.

    Where no slot takes part the log-sum-exp is -inf and the output the first piece's.
    """
    nowhere = lse[0].isneginf()  # slots are hidden from the last to the first
    lse = torch.cat([lse[:1].masked_fill(nowhere, 0.0), lse[1:]])
    total = lse.logsumexp(0)
    shares = (lse - total).exp().unsqueeze(-1)  # [P, B, T, HQ, 1]
    o = sum(share * output for share, output in zip(shares, outputs, strict=True))
    return o.to(outputs[0].dtype), total.masked_fill(nowhere, float("-inf"))


def _together(pieces: tuple[Tensor, ...]) -> Tensor:
    """Final keys or values; nothing of nothing."""
    return torch.cat(pieces, 2) if pieces[0].numel() else pieces[0]
