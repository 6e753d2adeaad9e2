"""Where each token stands: in its document, behind padding, among packed documents."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Positions of one forward pass, the same for every layer.

    Attributes:
        ids: position of each token in its own document, `[B, T]`.
        offset: position of each sequence's first place, `[N]` (negative for left padding): N = B, or the number
            of packed documents.
        padding: True where a place holds no token, `[B, T]`; None without an attention mask.
        cu_seqlens: bounds of packed documents, int32 `[N + 1]`; None when each row is one document.
        longest: tokens of the longest packed document, or more.
    """

    ids: Tensor
    offset: Tensor
    padding: Tensor | None = None
    cu_seqlens: Tensor | None = None
    longest: int | None = None

    @classmethod
    def resolve(
        cls,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        past: int,
        max_seqlen: int | None = None,
    ) -> "Positions":
        """Fill in what the caller left out.

        Args:
            inputs: `[B, T, hidden]`, for shape and device.
            attention_mask: `[B, past + T]`, 0 where padded.
            position_ids: `[B, T]` or `[1, T]`.
            cu_seqlens: `[N + 1]`.
            past: tokens already in the cache.
            max_seqlen: tokens of the longest packed document.

        Raises:
            ValueError: packed documents in several rows, beside a mask or with a cache; a mask that is not 2-D, or not
                of all tokens.
        """
        B, T = inputs.shape[:2]
        if cu_seqlens is None and position_ids is not None and attention_mask is None and past == 0:
            cu_seqlens = _restarts(position_ids)
        if cu_seqlens is not None:
            return cls._packed(B, T, inputs.device, attention_mask, cu_seqlens, past, max_seqlen)
        if attention_mask is None:
            if position_ids is None:
                position_ids = torch.arange(past, past + T, device=inputs.device)[None]
            ids = position_ids.expand(B, T)
            return cls(ids, ids[:, 0])
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be [batch, tokens], got shape {list(attention_mask.shape)}")
        if attention_mask.shape[1] != past + T:
            raise ValueError(
                f"attention_mask must be of all tokens, {past} in the cache and {T} that come; it is of "
                f"{attention_mask.shape[1]}"
            )
        seen = attention_mask.to(inputs.device).bool()
        here = seen[:, -T:]
        if position_ids is None:
            position_ids = (seen.cumsum(-1) - 1).clamp_min(0)[:, -T:]
        ids = position_ids.expand(B, T)
        if T > 1 and (here[:, :1].sum(1) + (here[:, 1:] & ~here[:, :-1]).sum(1) > 1).any():
            raise ValueError("attention_mask has padding between tokens; pad on the left or on the right")
        first = here.int().argmax(-1, keepdim=True)  # [B, 1]: the first token that is no padding
        return cls(ids, (ids.gather(1, first) - first)[:, 0], ~here)

    def begins_late(self) -> bool:
        """Whether padding parts some sequence's earlier tokens from those that come; of single places, never."""
        if self.padding is None or self.padding.shape[1] == 1:
            return False
        first = self.ids.masked_fill(self.padding, 0).amax(-1) - (~self.padding).sum(-1) + 1  # [B]
        return bool((self.padding[:, 0] & ~self.padding.all(-1) & (first > 0)).any())

    def to(self, device: torch.device, non_blocking: bool = False) -> "Positions":
        """On another device, for models whose layers are spread over several."""
        moved = {
            name: x.to(device, non_blocking=non_blocking) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)

    @classmethod
    def _packed(cls, B, T, device, attention_mask, cu_seqlens, past, max_seqlen) -> "Positions":
        if B != 1 or attention_mask is not None or past:
            raise ValueError(
                "packed documents come as one row of tokens ([1, total]), without attention_mask and without a cache"
            )
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=T)
        ids = torch.arange(T, device=device) - starts
        offset = torch.zeros(len(lengths), dtype=torch.long, device=device)
        return cls(ids[None], offset, None, cu_seqlens.to(torch.int32), max_seqlen or T)


def _restarts(position_ids: Tensor) -> Tensor | None:
    """Bounds of the documents in a row whose positions start again, or None when they only count up."""
    breaks = position_ids.diff(dim=-1) != 1  # [B, T - 1]
    if not breaks.any():
        return None
    if len(position_ids) > 1:
        raise ValueError("position_ids restart within several rows; flatten packed documents into one row ([1, total])")
    starts = breaks[0].nonzero()[:, 0] + 1
    ends = starts.new_tensor([position_ids.shape[1]])
    return torch.cat([torch.zeros_like(ends), starts, ends])
