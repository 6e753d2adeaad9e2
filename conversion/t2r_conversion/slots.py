"""How many slots each layer gets: more where what slots forget changes more of what later layers read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion.calibrate import Progress
from t2r_conversion.routers import fitted
from t2r_conversion.stream import Read, Stream, held_until
from t2r_kernels import MAX_SLOTS

FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)  # on `num_slots`: what is measured, and the least and most that a layer gets
MEASURED = 4  # windows that it is measured on
STEP = 8  # slots that are given at a time
POWER = 0.7  # of the residual stream's squared length


def can_differ(config: T2RConfig) -> bool:
    """Whether there are layers, and slots enough, to take from some for others."""
    return len(config.slot_layers) > 1 and config.num_slots >= 2 * STEP


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
    """How much slots change what a converted layer adds to the residual stream, for each of `FACTORS`.

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
            ways = {factor: held_until(foreseen, config, round(factor * config.num_slots)) for factor in FACTORS}
            needs[number] = [_change(stream, layer.self_attn, inputs, way, config.num_slots) for way in ways.values()]
            ends = ways[1.0]
        stream.advance(layer, inputs, ends)
        if progress is not None:
            progress(number + 1, count)
    return needs


def _change(stream: Stream, attention, inputs: list[Tensor], ends: Tensor, num_slots: int) -> float:
    changes = []
    for x, through, until in list(zip(stream.hidden, inputs, ends, strict=True))[:MEASURED]:
        change = stream.attend(attention, through, until) - stream.attend(attention, through)
        lengths = x[num_slots:].square().sum(-1)
        changes.append((change[num_slots:].square().sum(-1) / lengths**POWER).mean())
    return torch.stack(changes).mean().item()


def allotted(needs: dict[int, Sequence[float]], config: T2RConfig) -> list[int]:
    """The slots with which what is measured adds up to least, layers taken by themselves.

    Args:
        needs: for each converted layer, what is measured with `num_slots` times each of `FACTORS`.
        config: of the converted model.

    Returns:
        Slots of each layer, `num_slots` of those that are not converted.
    """
    least = max(config.num_sinks + 1, round(FACTORS[0] * config.num_slots))
    most = 2 * config.num_slots
    if config.num_slots <= MAX_SLOTS:
        most = min(most, MAX_SLOTS)  # the Triton kernels take no more
    slots = dict.fromkeys(needs, least)
    left = len(needs) * config.num_slots - sum(slots.values())

    def gain(layer: int) -> float:
        return _at(needs[layer], slots[layer], config) - _at(needs[layer], slots[layer] + STEP, config)

    while left >= STEP and (open_ones := [layer for layer in slots if slots[layer] + STEP <= most]):
        slots[max(open_ones, key=gain)] += STEP
        left -= STEP
    return [slots.get(layer, config.num_slots) for layer in range(config.num_hidden_layers)]


def _at(measured: Sequence[float], slots: int, config: T2RConfig) -> float:
    """What would be measured with so many slots: between what is, a power of their number."""
    known = [math.log(round(factor * config.num_slots)) for factor in FACTORS]
    values = [math.log(max(value, 1e-12)) for value in measured]
    place = max(i for i in range(len(known) - 1) if i == 0 or known[i] <= math.log(slots))
    slope = (values[place + 1] - values[place]) / (known[place + 1] - known[place])
    return math.exp(values[place] + slope * (math.log(slots) - known[place]))
