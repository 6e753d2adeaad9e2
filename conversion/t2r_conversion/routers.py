"""Fit the routers of a model to its source's attention on a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.modeling_t2r import T2RAttention
from t2r_conversion.calibrate import Progress
from t2r_conversion.stream import Read, Stream, ahead, held, held_until

LATER, FAR = 24, 400  # a token matters by the queries that come so many tokens later: not before, not after
ENDING = 64  # tokens before a window's end, which hardly any query follows
RIDGE = 0.01  # per token, on standardised inputs
SPREADS = (0.7, 1.0, 1.4)  # factors on the logarithm of importance, to choose from
CHOOSING, QUERIES = 6, 4  # windows that the choice looks at; every so many queries of them


@dataclass(frozen=True)
class Fit:
    """Fitted routers.

    Attributes:
        tensors: by name, fp32.
        r_squared: of each routed layer.
        errors: squared distance of each routed layer's output from its softmax attention's, relative to that one's
            squared length, mean over heads: what is lost where contexts are longer than its slots.
    """

    tensors: dict[str, Tensor]
    r_squared: list[float]
    errors: list[float]

    def as_dict(self) -> dict[str, list[float]]:
        """The figures, for the record."""
        return {name: [round(x, 4) for x in getattr(self, name)] for name in ("r_squared", "errors")}


@torch.no_grad()
def fit_routers(
    config: T2RConfig, read: Read, windows: Tensor, device: torch.device, progress: Progress | None = None
) -> Fit:
    """Routers that foresee how much attention each token will receive.

    A token's importance to a key/value head is the root mean square, over the queries that come `LATER` to `FAR` tokens
    later, of the softmax attention that it receives from the query heads: what a few need much counts for more than
    what many glance at. Its logarithm is regressed (ridge) on the layer's input, and multiplied by the factor of
    `SPREADS` that distorts the head's output least. A layer reads what the converted model will give it: layers before
    it attend to what their slots hold. Memory holds one layer at a time, the text's hidden states in fp32 and
    attention of one window and head.

    Args:
        config: of the converted model.
        read: gives the source's tensors.
        windows: tokens, `[windows, length]`.
        device: where.
        progress: called with the layers done and in all after each.
    """
    stream, fit = Stream(config, read, windows, device), Fit({}, [], [])
    count = max(config.slot_layers, default=-1) + 1
    for number, layer, inputs in stream.layers(count):
        ends = None
        if number in config.slot_layers:
            slots = config.slots_of(number)
            weight, bias, r_squared = fitted(stream, layer.self_attn, inputs)
            foreseen = torch.stack([x @ weight.T + bias for x in inputs])  # [windows, L, H]
            ways = torch.stack([held_until(foreseen * spread, config, slots) for spread in SPREADS])
            heads = [stream.heads(layer.self_attn, x) for x in inputs[:CHOOSING]]
            errors, best = distortion(heads, ways, slots).min(0)  # [H]
            ends = ways.gather(0, best.expand_as(ways[:1]))[0]  # [windows, L, H]
            spread = torch.tensor(SPREADS, device=device)[best]
            name = f"model.layers.{number}.self_attn.router."
            fit.tensors[name + "weight"] = (weight * spread[:, None]).cpu()
            fit.tensors[name + "bias"] = (bias * spread).cpu()
            fit.r_squared.append(r_squared)
            fit.errors.append(errors.mean().item())
        stream.advance(layer, inputs, ends)
        if progress is not None:
            progress(number + 1, count)
    return fit


def fitted(stream: Stream, attention: T2RAttention, inputs: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """A layer's router: weights `[H, hidden]`, bias `[H]` and R²."""
    counted = slice(stream.config.num_sinks, len(inputs[0]) - ENDING)
    importance = [received(stream, attention, x) for x in inputs]
    x, y = (torch.cat([part[counted] for part in parts]) for parts in (inputs, importance))
    return ridge(x, y.log())


def received(stream: Stream, attention: T2RAttention, x: Tensor) -> Tensor:
    """The attention that each token of a window `[L, hidden]` receives later: importance, `[L, H]`."""
    behind = ahead(x)
    later = (behind >= LATER) & (behind < FAR)
    attended = [
        ((weights.square().sum(0) * later).sum(0) / later.sum(0).clamp_min(1)).sqrt()
        for weights, _ in stream.heads(attention, x)
    ]
    return torch.stack(attended, 1).clamp_min(1e-9)


def distortion(heads: list[Iterator[tuple[Tensor, Tensor]]], ways: Tensor, slots: Sequence[int]) -> Tensor:
    """How far attention to what the slots hold is from attention to everything, for several ways to give slots.

    Args:
        heads: for each window, attention weights `[G, L, L]` and values `[L, D]` of each key/value head.
        ways: the position at which each token's slot is taken over, `[ways, windows, L, H]`.
        slots: of each head; what comes within them is the same in all ways.

    Returns:
        Squared distance relative to the squared length, mean over windows, `[ways, H]`.
    """
    errors = []
    for window, of_window in enumerate(heads):
        for head, (weights, v) in enumerate(of_window):
            queries = torch.arange(slots[head], ways.shape[2], QUERIES, device=ways.device)
            weights = weights[:, queries]  # [G, Q, L]
            expected = weights @ v
            for ends in ways[:, window, :, head]:
                distance = held(weights, queries, ends) @ v - expected
                errors.append(distance.square().sum() / expected.square().sum())
    return torch.stack(errors).view(len(heads), -1, len(ways)).mean(0).T


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression of `y [n, k]` on standardised `x [n, d]`.

    Returns:
        Weights for `x` as it is, `[k, d]`; the bias with which predictions have mean 0, `[k]`; and R² on these data,
        mean over `k`.
    """
    scale = x.std(0).clamp_min(1e-6)
    standard, centred = (x - x.mean(0)) / scale, (y - y.mean(0)).double()
    gram = (standard.T @ standard).double()
    gram.diagonal().add_(RIDGE * len(x))
    weight = torch.linalg.solve(gram, (standard.double().T @ centred))  # [d, k]
    left = (centred - standard.double() @ weight).square().sum(0)
    fit = (1 - left / centred.square().sum(0)).mean().item()
    weight = (weight.T / scale).float()
    return weight, -weight @ x.mean(0), fit
