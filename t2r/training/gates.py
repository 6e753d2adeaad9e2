"""How a model's forget gates stand: figures of one forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from t2r.model import SLOT_ATTENTION, T2RForCausalLM
from t2r.model.starts import gate_of
from t2r.training.adapters import base_of
from t2r_kernels import log_gate

SATURATED = 1e-3  # a gate closer than this to 0 or 1 hardly has a gradient


@contextmanager
def watched_gates(model: T2RForCausalLM | PeftModel) -> Iterator[list[torch.Tensor]]:
    """Watch the forward pass within the context: what it yields gets three figures of each converted layer, `[3]`.

    They are the mean gate α, the share of gates within 0.001 of 0 or 1, and what is written a token, Σ (1 − α)
    over heads.
    Packed rows only: padding would count as tokens.
    """
    figures: list[torch.Tensor] = []

    @torch.no_grad()
    def look(attention, arguments, keywords, _):
        if attention.kind not in SLOT_ATTENTION:  # the teacher passes by in the student's own layers
            return
        written = attention.schedule(arguments[0], keywords["positions"], keywords["slots"])
        alpha = torch.cat(
            [log_gate(logits, gate_of(slots, attention.config)).exp().flatten(2) for _, logits, slots, _ in written], 2
        )  # [B, T, slots of all heads]
        saturated = (alpha < SATURATED) | (alpha > 1 - SATURATED)
        figures.append(torch.stack([alpha.mean(), saturated.float().mean(), (1 - alpha).sum(-1).mean()]))

    layers = [layer.self_attn for layer in base_of(model).model.layers if layer.self_attn.kind in SLOT_ATTENTION]
    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield figures
    finally:
        for hook in hooks:
            hook.remove()


def gate_statistics(figures: torch.Tensor, slots: list[int]) -> dict[str, list[float] | float]:
    """What was watched, in words that people use.

    Args:
        figures: of all layers, `[layers, 3]`.
        slots: of each of these layers, over heads.

    Returns:
        `mean` and `saturated` as above; `memory`, the tokens for which something stays in a slot: slots over what is
        written a token; all over tokens, heads and layers. `memory_by_layer`: the latter for each converted layer.
    """
    mean, saturated, written = figures.mean(0).tolist()
    by_layer = [count / max(x, 1e-9) for count, x in zip(slots, figures[:, 2].tolist(), strict=True)]
    return {
        "mean": mean,
        "saturated": saturated,
        "memory": sum(slots) / len(slots) / max(written, 1e-9),
        "memory_by_layer": by_layer,
    }
