"""Gated Slot Attention, chunk-parallel, in plain PyTorch: the `torch` backend.

Inside a chunk of C tokens everything follows from one weight, W_ij = exp(G_i - G_j) s_j per slot (i >= j,
G the cumulative sum of the log gates): both passes of the paper (arXiv 2409.07146, section 3.2) contract it.
Differences are taken before `exp`, so no exponent is positive and gates of -30 do no harm. Chunks are handled
in groups whose C x C x M weight fits `GROUP_BYTES`; each group is recomputed in the backward pass, so what is
kept for it is the inputs and one state a group.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2r_kernels.state import SlotState

CHUNK = 16
GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Layout:
    """How tokens are laid into chunks. A chunk never holds tokens of two sequences.

    `enters` names the sequences whose first chunk is chunk c (a slice of the initial state), `leaves` those
    whose last it is.
    """

    num_chunks: int
    enters: dict[int, slice]
    leaves: dict[int, slice]
    source: Tensor | None  # packed only: [num_chunks * C], the token in each place, -1 for none
    position: Tensor  # [R, num_chunks, C]: position of each place in its own sequence


def chunk_gsa(
    q: Tensor,  # [B, T, HQ, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, Dv]
    g: Tensor,  # [B, T, H, M]
    s: Tensor,  # [B, T, H, M]
    scale: float,
    state: SlotState,
    cu_seqlens: Tensor | None,
    hide_unwritten: bool,
    position_offset: Tensor,  # [N]
    output_lse: bool = False,
) -> tuple[Tensor, SlotState, Tensor | None]:
    """Chunk-parallel `gsa`; arguments as `naive_gsa`, same results."""
    (R, T, H, M), HQ = g.shape, q.shape[2]
    if T == 0:
        return v.new_zeros(R, 0, HQ, v.shape[-1]), state, q.new_zeros(R, 0, HQ) if output_lse else None
    layout = _dense_layout(T, position_offset) if cu_seqlens is None else _packed_layout(cu_seqlens, position_offset)
    q, k, v, g, s = (_to_chunks(x, layout) for x in (q, k, v, g, s))  # [R, H(Q), n, C, .]
    q = q.unflatten(1, (H, HQ // H)).permute(0, 1, 3, 4, 2, 5)  # [R, H, n, C, HQ/H, D]
    position = layout.position if hide_unwritten else None

    per_chunk = R * H * CHUNK * CHUNK * M * g.element_size()
    step = max(1, GROUP_BYTES // per_chunk)
    finals: dict[int, SlotState] = {}
    outputs, sums, carry = [], [], state
    for first in range(0, layout.num_chunks, step):
        chunks = slice(first, first + step)
        o, lse, afters, carry = checkpoint(
            _group,
            *(x[:, :, chunks] for x in (q, k, v, g, s)),
            scale,
            None if position is None else position[:, chunks],
            _shift(layout.enters, chunks),
            state,
            carry,
            output_lse,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(o)
        sums.append(lse)
        for c, sequences in layout.leaves.items():
            if first <= c < first + step:
                finals[sequences.start or 0] = SlotState(*(x[c - first] for x in afters))
    o = _to_tokens(torch.cat(outputs, 2), T, layout)
    final = _final_state(state, finals, packed=cu_seqlens is not None)
    return o, final, _to_tokens(torch.cat(sums, 2), T, layout) if output_lse else None


def _group(q, k, v, g, s, scale, position, enters, state, carry, output_lse):
    """One group of chunks. Returns outputs, their lse, the states after each chunk (two lists), and the last state."""
    n, C, M = g.shape[2:]
    G = g.cumsum(-2)  # [R, H, n, C, M]
    total = G[..., -1:, :]  # [R, H, n, 1, M]
    written = (total - G).exp().mul(s).mT  # [R, H, n, M, C]: what each token leaves at the chunk's end
    keep = total.mT.exp()  # [R, H, n, M, 1]

    befores, afters = [], []
    for x, new, fresh in zip(carry, (written @ k, written @ v), state, strict=True):
        before, after = [], []
        # unbind, not x[:, :, c]: its gradient is one stack, where n selects would fill n whole tensors.
        for c, (kept, add) in enumerate(zip(keep.unbind(2), new.unbind(2), strict=True)):
            if c in enters:
                x = fresh[enters[c]]
            before.append(x)
            x = torch.addcmul(add, kept, x)  # [R, H, M, D]
            after.append(x)
        befores.append(torch.stack(before, 2))  # [R, H, n, M, D]
        afters.append(after)
    keys, values = befores

    causal = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()[..., None]  # [C, C, 1]
    decay = (G.unsqueeze(-2) - G.unsqueeze(-3)).masked_fill_(~causal, float("-inf")).exp_()  # [R, H, n, C, C, M]
    weight = decay * s.unsqueeze(-3)  # [R, H, n, C, C, M], zero above the diagonal
    carried = G.exp().unsqueeze(-2)  # [R, H, n, C, 1, M]

    q = q * scale
    rows = q.flatten(3, 4)  # [R, H, n, C * HQ/H, D]
    scores = (rows @ k.mT).unflatten(3, (C, -1))  # [R, H, n, C, HQ/H, C]
    logits = (rows @ keys.mT).unflatten(3, (C, -1)) * carried + scores @ weight  # [R, H, n, C, HQ/H, M]
    if position is not None:
        hidden = torch.arange(M, device=g.device) > position.clamp_min(0)[..., None]  # [R, n, C, M]
        logits = logits.masked_fill(hidden[:, None, :, :, None], float("-inf"))
    p = logits.softmax(-1)
    o = (p * carried).flatten(3, 4) @ values + (p @ weight.mT).flatten(3, 4) @ v  # [R, H, n, C * HQ/H, Dv]
    lse = logits.logsumexp(-1) if output_lse else None  # [R, H, n, C, HQ/H]
    if output_lse and position is not None:
        lse = lse.masked_fill((position < 0)[:, None, ..., None], float("-inf"))
    return o.unflatten(3, (C, -1)), lse, afters, SlotState(afters[0][-1], afters[1][-1])


def _dense_layout(T: int, position_offset: Tensor) -> _Layout:
    num_chunks = -(-T // CHUNK)
    place = torch.arange(num_chunks * CHUNK, device=position_offset.device)
    position = (position_offset[:, None] + place).unflatten(1, (num_chunks, CHUNK))
    everyone = slice(None)
    return _Layout(num_chunks, {0: everyone}, {num_chunks - 1: everyone}, None, position)


def _packed_layout(cu_seqlens: Tensor, position_offset: Tensor) -> _Layout:
    bounds, device = cu_seqlens.tolist(), position_offset.device
    enters, leaves, source, position = {}, {}, [], []
    num_chunks = 0
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        chunks = -(-(end - start) // CHUNK)
        if chunks == 0:
            continue
        enters[num_chunks] = leaves[num_chunks + chunks - 1] = slice(n, n + 1)
        place = torch.arange(chunks * CHUNK)
        source.append((place + start).masked_fill(place >= end - start, -1))
        position.append(place.to(device) + position_offset[n])
        num_chunks += chunks
    position = torch.cat(position).view(1, num_chunks, CHUNK)
    return _Layout(num_chunks, enters, leaves, torch.cat(source).to(device), position)


def _to_chunks(x: Tensor, layout: _Layout) -> Tensor:
    """`[R, T, heads, X]` to `[R, heads, n, C, X]`; places without a token are zero: they neither write nor forget."""
    if layout.source is None:
        x = F.pad(x, (0, 0, 0, 0, 0, layout.num_chunks * CHUNK - x.shape[1]))
    else:
        absent = (layout.source < 0)[:, None, None]
        x = x.index_select(1, layout.source.clamp_min(0)).masked_fill(absent, 0)
    return x.unflatten(1, (layout.num_chunks, CHUNK)).permute(0, 3, 1, 2, 4)


def _to_tokens(o: Tensor, T: int, layout: _Layout) -> Tensor:
    """`[R, H, n, C, HQ/H, ...]` to `[R, T, HQ, ...]`."""
    o = o.movedim(1, 3).flatten(3, 4).flatten(1, 2)  # [R, n * C, HQ, ...]
    if layout.source is None:
        return o[:, :T]
    return o.index_select(1, (layout.source >= 0).nonzero()[:, 0])


def _shift(enters: dict[int, slice], chunks: slice) -> dict[int, slice]:
    return {c - chunks.start: sequences for c, sequences in enters.items() if chunks.start <= c < chunks.stop}


def _final_state(state: SlotState, finals: dict[int, SlotState], packed: bool) -> SlotState:
    if not packed:
        return finals[0]
    kept = [SlotState(*(x[n : n + 1] for x in state)) for n in range(len(state.keys))]  # empty sequences
    for n, final in finals.items():
        kept[n] = final
    return SlotState(*(torch.cat(x) for x in zip(*kept, strict=True)))
