"""Key/value heads of a layer by their number of slots: those that have as many are computed together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HeadGroup(NamedTuple):
    """Heads that have as many slots as one another.

    Attributes:
        num_slots: of each of them.
        heads: their numbers.
    """

    num_slots: int
    heads: tuple[int, ...]


def head_groups(slots: Sequence[int]) -> list[HeadGroup]:
    """A layer's heads by their slots, those with fewest first.

    Args:
        slots: of each head.
    """
    return [HeadGroup(n, tuple(head for head, x in enumerate(slots) if x == n)) for n in sorted(set(slots))]


def of_group(x: Tensor, group: HeadGroup, num_heads: int) -> Tensor:
    """Of `[B, T, all heads, ...]`, key/value heads or the query heads that read them, a group's.

    Args:
        x: with a multiple of `num_heads`.
        group: from `head_groups`.
        num_heads: key/value heads of the layer.
    """
    if len(group.heads) == num_heads:
        return x
    each = x.split(x.shape[2] // num_heads, 2)
    return torch.cat([each[head] for head in group.heads], 2) if len(group.heads) > 1 else each[group.heads[0]]


def in_order(parts: Sequence[Tensor], groups: Sequence[HeadGroup]) -> Tensor:
    """What `of_group` took apart, `[B, T, heads, ...]` of each group, as it was."""
    if len(parts) == 1:
        return parts[0]
    each = {}
    for part, group in zip(parts, groups, strict=True):
        each |= zip(group.heads, part.split(part.shape[2] // len(group.heads), 2), strict=True)
    return torch.cat([each[head] for head in sorted(each)], 2)
