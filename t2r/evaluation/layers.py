"""Which layers a converted model misses softmax attention in most."""

from collections.abc import Callable

import torch
from torch import Tensor

from t2r.evaluation.perplexity import window_nlls
from t2r.model import T2RForCausalLM

Progress = Callable[[int, int], None]
"""Called with the evaluations done and those in all."""


def softmax_gains(
    model: T2RForCausalLM, windows: Tensor, keep: int = 0, *, batch_size: int = 1, progress: Progress | None = None
) -> tuple[dict[int, float], list[tuple[int, float]]]:
    """How much better a model predicts if a layer is the softmax attention that it came from.

    Args:
        model: a converted model, not trained yet: afterwards its projections are no longer the source's.
        windows: tokens to predict, `[windows, window]`.
        keep: how many layers to choose, one after another: each that gains most beside those chosen before, of the
            `2 * keep` that gain most by themselves.
        batch_size: windows in one forward pass.
        progress: called after each evaluation.

    Returns:
        The gain of each converted layer by itself, in nats a token; and the layers chosen, with what they gain together
        with those before them.

    Raises:
        ValueError: the model has fewer than `keep` converted layers, or see `window_nlls`.
    """
    converted = model.config.slot_layers
    if not 0 <= keep <= len(converted):
        raise ValueError(f"keep: {keep} layers to choose of {len(converted)} that are converted")
    done, total = 0, 1 + len(converted) + sum(min(2 * keep, len(converted)) - i for i in range(1, keep))

    def loss(layers: list[int]) -> float:
        nonlocal done
        with torch.no_grad(), model.softmax_attention(layers):
            found = window_nlls(model, windows, batch_size=batch_size).mean().item()
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    before = loss([])
    gains = {layer: before - loss([layer]) for layer in converted}
    best = sorted(gains, key=gains.get, reverse=True)[: 2 * keep]
    chosen: list[tuple[int, float]] = [(best[0], gains[best[0]])] if keep else []
    while len(chosen) < keep:
        kept = [layer for layer, _ in chosen]
        together = {layer: before - loss([*kept, layer]) for layer in best if layer not in kept}
        chosen.append(max(together.items(), key=lambda item: item[1]))
    return gains, chosen
