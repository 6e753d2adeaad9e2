"""How many slots each head gets: more where what slots forget changes more of what later layers read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.modeling_t2r import T2RAttention
from t2r_conversion import calibrate
from t2r_conversion.calibrate import Progress
from t2r_conversion.routers import fitted
from t2r_conversion.stream import Read, Stream, held, held_until

FACTORS = (0.5, 1.0, 2.0, 4.0)  # on `num_slots`. Kernels are compiled for each number of slots, so there are few.
MEASURED = 16  # windows that it is measured on, at most
POWER = 0.7  # of the residual stream's squared length

Head = tuple[int, int]
"""The number of a layer, and that of a key/value head in it."""


def levels(config: T2RConfig) -> list[int]:
    """The slots that a head may get, least first: as many as half a window of text shows the worth of, or twice
    `num_slots`."""
    choices, most = {round(factor * config.num_slots) for factor in FACTORS}, calibrate.WINDOW // 2
    return sorted(n for n in choices if config.num_sinks < n <= max(most, 2 * config.num_slots))


def can_differ(config: T2RConfig) -> bool:
    """Whether some heads may have fewer slots than others, so that these may have more."""
    choices, heads = levels(config), len(config.slot_layers) * config.num_key_value_heads
    return heads > 1 and choices[0] < config.num_slots < choices[-1]


@torch.no_grad()
def slots_by_need(
    config: T2RConfig, read: Read, windows: Tensor, device: torch.device, progress: Progress | None = None
) -> list[int | list[int]]:
    """Slots of each layer, or of each of its heads where they differ, that add up to no more than `num_slots` in each.

    Args:
        config: of the converted model, with as many slots in each head.
        read: gives the source's tensors.
        windows: tokens, `[windows, length]`.
        device: where.
        progress: called with the layers done and in all after each.
    """
    return by_layer(allotted(_needs(config, read, windows, device, progress), config), config)


def _needs(
    config: T2RConfig, read: Read, windows: Tensor, device: torch.device, progress: Progress | None
) -> dict[Head, list[float]]:
    """How much a head's slots change what its layer adds to the residual stream, for each of `levels`.

    It is the squared length of the change over the stream's own, that to the power of `POWER`: a change that is as
    large as another relative to the stream matters more in later layers. Mean over the tokens of a window from
    `num_slots` on. The power is what goes best with the perplexity that softmax attention in single layers of
    SmolLM2-135M brings back.
    """
    stream, needs = Stream(config, read, windows, device), {}
    heads, count = config.num_key_value_heads, max(config.slot_layers, default=-1) + 1
    for number, layer, inputs in stream.layers(count):
        ends = None
        if number in config.slot_layers:
            weight, bias, _ = fitted(stream, layer.self_attn, inputs)
            foreseen = torch.stack([x @ weight.T + bias for x in inputs])  # [windows, L, H]
            ways = {slots: held_until(foreseen, config, [slots] * heads) for slots in levels(config)}
            changes = _changes(stream, layer.self_attn, inputs, list(ways.values()), config.num_slots)
            needs |= {(number, head): of_head for head, of_head in enumerate(changes)}
            ends = ways[config.num_slots]
        stream.advance(layer, inputs, ends)
        if progress is not None:
            progress(number + 1, count)
    return needs


def _changes(
    stream: Stream, attention: T2RAttention, inputs: list[Tensor], ways: list[Tensor], num_slots: int
) -> list[list[float]]:
    """The change of the residual stream that each head makes, for each of several ways to hold tokens,
    `[windows, L, H]`."""
    windows = list(zip(stream.hidden, inputs, strict=True))[:MEASURED]
    places = torch.arange(len(inputs[0]), device=inputs[0].device)
    outward = attention.o_proj.weight.split(attention.num_key_value_groups * attention.head_dim, 1)  # of each head
    changes = torch.zeros(len(windows), len(outward), len(ways))
    for window, (x, through) in enumerate(windows):
        lengths = x.square().sum(-1) ** POWER  # [L]
        for head, (weights, v) in enumerate(stream.heads(attention, through)):
            whole = weights @ v  # [G, L, D]
            for way, ends in enumerate(ways):
                difference = held(weights, places, ends[window, :, head]) @ v - whole
                change = difference.transpose(0, 1).flatten(1) @ outward[head].T  # [L, hidden]
                changes[window, head, way] = (change.square().sum(-1) / lengths)[num_slots:].mean()
    return changes.mean(0).tolist()


def allotted(needs: dict[Head, Sequence[float]], config: T2RConfig) -> dict[Head, int]:
    """The slots with which what is measured adds up to little, heads taken by themselves.

    All begin with the least. What slots are left go where one more saves most, one step after another.

    Args:
        needs: for each converted head, what is measured with each of `levels`.
        config: of the converted model.
    """
    choices = levels(config)
    chosen = dict.fromkeys(needs, 0)  # of these, by head
    left = len(needs) * (config.num_slots - choices[0])
    while True:
        steps = [
            ((needs[head][now] - needs[head][to]) / (choices[to] - choices[now]), head, to)
            for head, now in chosen.items()
            for to in range(now + 1, len(choices))
            if choices[to] - choices[now] <= left
        ]
        if not steps:
            break
        _, head, to = max(steps)
        left -= choices[to] - choices[chosen[head]]
        chosen[head] = to
    return {head: choices[number] for head, number in chosen.items()}


def by_layer(slots: dict[Head, int], config: T2RConfig) -> list[int | list[int]]:
    """Slots of heads as a configuration names them; `num_slots` for layers that are not converted."""
    named: list[int | list[int]] = [config.num_slots] * config.num_hidden_layers
    for layer in config.slot_layers:
        each = [slots[layer, head] for head in range(config.num_key_value_heads)]
        named[layer] = each if len(set(each)) > 1 else each[0]
    return named
