"""What merging would gain over overwriting, before any training: a simulation of slots, one token after the other.

    python -m benchmarks.merging MODEL --text TEXT

MODEL is a converted model of the routed start. A token that loses its slot is merged into the slot whose key is most
like its own, if it is like enough; or a token that comes is merged in place of taking over a slot (which alone is a
write that the operator could do). Keys and values of what is merged are means, by how many tokens each stands for, and
attention counts a slot as often as tokens are in it: by the logarithm of their number, added to the slot's logit.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import write_results
from t2r.model.heads import in_order, of_group
from t2r.model.modeling_t2r import T2RAttention

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Way:
    """What becomes of tokens.

    Attributes:
        merged: those that are merged: `none`, `evicted` or `arriving`.
        alike: the cosine of two rotated keys from which on they are.
        counted: whether attention counts how many tokens a slot stands for.
        worth: whether a slot ages as slowly as the most important token in it.
    """

    merged: str = "none"
    alike: float = 0.85
    counted: bool = True
    worth: bool = True


WAYS = {
    "overwritten": Way(),
    "evicted": Way("evicted"),
    "evicted/any": Way("evicted", alike=0.0),
    "evicted/worth_of_its_own": Way("evicted", worth=False),
    "evicted/uncounted": Way("evicted", counted=False),
    "arriving": Way("arriving", alike=0.95),
    "arriving/alike0.9": Way("arriving", alike=0.9),
}


def attend(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, num_slots: int, num_sinks: int, way: Way) -> Tensor:
    """Attention to slots as they are at each token.

    Args:
        q: rotated, `[B, T, HQ, D]`.
        k: rotated, `[B, T, H, D]`.
        v: `[B, T, H, D]`.
        rates: how fast each token ages, `[B, T, H]`; sinks have 0.
        num_slots: M.
        num_sinks: slots that nothing is merged into.
        way: what becomes of tokens.

    Returns:
        `[B, T, HQ, D]`.
    """
    (B, T, H, D), M = k.shape, num_slots
    keys, values = k.new_zeros(B, H, M, D), v.new_zeros(B, H, M, D)
    count, place, rate = (k.new_zeros(B, H, M) for _ in range(3))
    slots, outputs = torch.arange(M), []

    def merge(key: Tensor, value: Tensor, tokens: Tensor, ageing: Tensor, unlike: Tensor) -> tuple[Tensor, Tensor]:
        """Merge what has `[B, H, 1, D]` into a slot other than `unlike`: whether it was, and where, `[B, H, 1]`."""
        near = F.cosine_similarity(key, keys, dim=-1).masked_fill(unlike | (slots < num_sinks), -2)
        cosine, into = near.max(-1, keepdim=True)
        done = cosine > way.alike
        at = into[..., None].expand(B, H, 1, D)
        share = (done * tokens / (tokens + count.gather(2, into)))[..., None]
        keys.scatter_(2, at, keys.gather(2, at).lerp(key, share))
        values.scatter_(2, at, values.gather(2, at).lerp(value, share))
        count.scatter_add_(2, into, done * tokens)
        if way.worth:
            slowest = torch.minimum(rate.gather(2, into), ageing)
            rate.scatter_(2, into, torch.where(done, slowest, rate.gather(2, into)))
        return done, into

    for t in range(T):
        key, value, ageing = k[:, t, :, None], v[:, t, :, None], rates[:, t, :, None]
        one, merged = torch.ones_like(ageing), torch.zeros_like(ageing, dtype=torch.bool)
        slot = ((t - place) * rate).argmax(-1, keepdim=True) if t >= M else torch.full_like(ageing, t, dtype=torch.long)
        at = slot[..., None].expand(B, H, 1, D)
        if t >= M and way.merged == "evicted":
            whose = count.gather(2, slot), rate.gather(2, slot)
            merge(keys.gather(2, at), values.gather(2, at), *whose, slots == slot)
        if t >= M and way.merged == "arriving":
            merged, into = merge(key, value, one, ageing, slots < 0)
            place.scatter_(2, into, torch.where(merged, t * one, place.gather(2, into)))
        keys.scatter_(2, at, torch.where(merged[..., None], keys.gather(2, at), key))
        values.scatter_(2, at, torch.where(merged[..., None], values.gather(2, at), value))
        for held, new in ((count, one), (place, t * one), (rate, ageing)):
            held.scatter_(2, slot, torch.where(merged, held.gather(2, slot), new))
        logits = D**-0.5 * q[:, t].reshape(B, H, -1, D) @ keys.mT  # [B, H, HQ/H, M]
        if way.counted:
            logits = logits + count.clamp_min(1).log()[:, :, None]
        logits = logits.masked_fill(slots > t, float("-inf"))
        outputs.append((logits.softmax(-1) @ values).flatten(1, 2))
    return torch.stack(outputs, 1)


@contextmanager
def simulated(way: Way) -> Iterator[None]:
    """Within the context, layers with slots attend to simulated ones."""

    def slots(self, hidden_states, q, k, v, positions, _slots, rope, _past):
        q, k = self.rotate(q, k, *rope)
        sinks = (positions.ids < self.config.num_sinks).unsqueeze(-1)
        rates = self.router(hidden_states).neg().exp().masked_fill(sinks, 0.0)
        outputs = []
        for group in self.groups:
            of_q, of_k, of_v, of_rates = (of_group(x, group, k.shape[2]) for x in (q, k, v, rates))
            outputs.append(attend(of_q, of_k, of_v, of_rates, group.num_slots, self.config.num_sinks, way))
        return in_order(outputs, self.groups).flatten(2)

    before, T2RAttention._slots = T2RAttention._slots, slots
    try:
        yield
    finally:
        T2RAttention._slots = before


@torch.no_grad()
def main() -> None:
    """Measure every way on the first windows of a text."""
    from t2r.evaluation import cut_windows, load_model, load_tokenizer, read_text, summarise, window_nlls

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32", device="cpu"), load_tokenizer(options.model)
    windows = cut_windows(tokenizer, read_text(options.text), 1024, options.windows)
    measure = partial(window_nlls, model, windows, batch_size=len(windows))
    with model.softmax_attention():
        teacher = measure()
    rows, table = [], Table("what is merged", "ratio", "512–1,023")
    for name, way in WAYS.items():
        with simulated(way):
            report = summarise(measure(), teacher)
        bands = {f"{band.start}-{band.end}": round(band.ratio, 4) for band in report.bands}
        rows.append({"name": name, "unit": "ratio", "ours": round(report.overall.ratio, 4), "bands": bands})
        table.add_row(name, f"{report.overall.ratio:.3f}", f"{report.bands[-1].ratio:.3f}")
        write_results("merging", rows, options.out)
    Console().print(table)


if __name__ == "__main__":
    main()
