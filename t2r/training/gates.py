"""How a model's forget gates stand: figures of one forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from t2r.model import LINEAR_ATTENTION, T2RForCausalLM
from t2r.model.starts import gate_of
from t2r.training.adapters import base_of
from t2r_kernels import log_gate

SATURATED = 1e-3  # a gate closer than this to 0 or 1 hardly has a gradient


@contextmanager
def gate_statistics(model: T2RForCausalLM | PeftModel) -> Iterator[dict[str, list[float] | float]]:
    """Watch the forward pass within the context; what it yields holds the figures once the context has ended.

    Packed rows only: padding would count as tokens.

    `mean` is the mean gate α; `saturated` the share of gates within 0.001 of 0 or 1; `memory` the tokens for which
    something stays in a slot: slots over what is written a token, Σ (1 − α), all over tokens, heads and layers;
    `memory_by_layer` the latter for each converted layer.
    """
    found: dict[str, list[float] | float] = {}
    figures: list[torch.Tensor] = []  # [3] a layer: mean, saturated, written a token

    @torch.no_grad()
    def look(attention, arguments, keywords, _):
        if attention.kind != LINEAR_ATTENTION:  # the teacher passes by in the student's own layers
            return
        logits = attention.f_proj(arguments[0]).unflatten(-1, (-1, attention.config.num_slots))
        slots, _ = attention.schedule(arguments[0], keywords["positions"], keywords["slots"])
        alpha = log_gate(logits, gate_of(slots, attention.config)).exp()  # [B, T, H, M]
        saturated = (alpha < SATURATED) | (alpha > 1 - SATURATED)
        figures.append(torch.stack([alpha.mean(), saturated.float().mean(), (1 - alpha).sum(-1).mean()]))

    layers = [layer.self_attn for layer in base_of(model).model.layers if layer.self_attn.kind == LINEAR_ATTENTION]
    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    mean, saturated, written = torch.stack(figures).mean(0).tolist()
    slots = base_of(model).config.num_slots
    found |= {"mean": mean, "saturated": saturated, "memory": slots / max(written, 1e-9)}
    found["memory_by_layer"] = [slots / max(x, 1e-9) for x in torch.stack(figures)[:, 2].tolist()]
