"""How many slots each layer gets: more where what slots forget changes more of what later layers read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.modeling_t2r import T2RAttention
from t2r_conversion.calibrate import Progress
from t2r_conversion.routers import fitted
from t2r_conversion.stream import Read, Stream, held_until

FACTORS = (0.5, 1.0, 2.0)  # on `num_slots`. Kernels are compiled for each number of slots, so there are few.
MEASURED = 4  # windows that it is measured on
POWER = 0.7  # of the residual stream's squared length


def levels(config: T2RConfig) -> list[int]:
    """The slots that a layer may get, least first."""
    choices = {round(factor * config.num_slots) for factor in FACTORS}
    return sorted(slots for slots in choices if config.num_sinks < slots)


def can_differ(config: T2RConfig) -> bool:
    """Whether some layers may have fewer slots than others, so that these may have more."""
    choices = levels(config)
    return len(config.slot_layers) > 1 and choices[0] < config.num_slots < choices[-1]


@torch.no_grad()
def slots_by_need(
    config: T2RConfig, read: Read, windows: Tensor, device: torch.device, progress: Progress | None = None
) -> list[int]:
    """Slots of each layer, that add up to no more than `num_slots` in each.

    Args:
        config: of the converted model, with as many slots in each layer.
        read: gives the source's tensors.
        windows: tokens, `[windows, length]`.
        device: where.
        progress: called with the layers done and in all after each.
    """
    return allotted(_needs(config, read, windows, device, progress), config)


def _needs(
    config: T2RConfig, read: Read, windows: Tensor, device: torch.device, progress: Progress | None
) -> dict[int, list[float]]:
    """How much slots change what a converted layer adds to the residual stream, for each of `levels`.

    It is the squared length of the change over the stream's own, that to the power of `POWER`: a change that is as
    large as another relative to the stream matters more in later layers. Mean over tokens that no slots held whole. The
    power is what goes best with the perplexity that softmax attention in single layers of SmolLM2-135M brings back.
    """
    stream, needs = Stream(config, read, windows, device), {}
    count = max(config.slot_layers, default=-1) + 1
    for number, layer, inputs in stream.layers(count):
        ends = None
        if number in config.slot_layers:
            weight, bias, _ = fitted(stream, layer.self_attn, inputs)
            foreseen = torch.stack([x @ weight.T + bias for x in inputs])  # [windows, L, H]
            ways = {slots: held_until(foreseen, config, slots) for slots in levels(config)}
            needs[number] = _changes(stream, layer.self_attn, inputs, list(ways.values()), config.num_slots)
            ends = ways[config.num_slots]
        stream.advance(layer, inputs, ends)
        if progress is not None:
            progress(number + 1, count)
    return needs


def _changes(
    stream: Stream, attention: T2RAttention, inputs: list[Tensor], ways: list[Tensor], num_slots: int
) -> list[float]:
    """The change of the residual stream, for each of several ways to hold tokens, `[windows, L, H]`."""
    changes = []
    for window, (x, through) in enumerate(zip(stream.hidden, inputs, strict=True)):
        if window == MEASURED:
            break
        whole, lengths = stream.attend(attention, through), x.square().sum(-1)  # [L, hidden], [L]
        differences = torch.stack([stream.attend(attention, through, ends[window]) - whole for ends in ways])
        changes.append((differences.square().sum(-1) / lengths**POWER)[:, num_slots:].mean(-1))
    return torch.stack(changes).mean(0).tolist()


def allotted(needs: dict[int, Sequence[float]], config: T2RConfig) -> list[int]:
    """The slots with which what is measured adds up to little, layers taken by themselves.

    All begin with the least. What slots are left go where one more changes least what is lost, one layer after another.

    Args:
        needs: for each converted layer, what is measured with each of `levels`.
        config: of the converted model.

    Returns:
        Slots of each layer, `num_slots` of those that are not converted.
    """
    choices = levels(config)
    chosen = dict.fromkeys(needs, 0)  # of these, by layer
    left = len(needs) * (config.num_slots - choices[0])
    while True:
        steps = [
            ((needs[layer][now] - needs[layer][to]) / (choices[to] - choices[now]), layer, to)
            for layer, now in chosen.items()
            for to in range(now + 1, len(choices))
            if choices[to] - choices[now] <= left
        ]
        if not steps:
            break
        _, layer, to = max(steps)
        left -= choices[to] - choices[chosen[layer]]
        chosen[layer] = to
    slots = {layer: choices[number] for layer, number in chosen.items()}
    return [slots.get(layer, config.num_slots) for layer in range(config.num_hidden_layers)]
