"""Whether a converted model still is its source."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2r.evaluation.loading import load_model, load_tokenizer
from t2r.model import T2RForCausalLM

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far logits may be from the source's, of their standard deviation: what rounding makes of it."""


@dataclass(frozen=True)
class Verification:
    """How a converted model's logits compare with its source's on the same tokens.

    Attributes:
        tokens: how many.
        softmax: the largest difference with softmax attention, in standard deviations of the source's logits.
        slots: the same with slots, on the first tokens, which all heads' slots hold.
        agreement: share of all tokens at which the converted model would say what its source would.
    """

    tokens: int
    softmax: float
    slots: float
    agreement: float


@torch.no_grad()
def verify_conversion(
    source: str | Path, converted: str | Path, text: str, tokens: int = 512, *, device: str = "auto"
) -> Verification:
    """Load a source and what was made of it, one after the other, and compare them.

    Args:
        source: as for `load_model`.
        converted: a folder.
        text: what both read.
        tokens: of the text, at most.
        device: where.

    Raises:
        ValueError: one of the two cannot be loaded, the text is empty, or with softmax attention the converted model is
            not its source.
    """
    ids = torch.tensor(load_tokenizer(converted)(text, verbose=False)["input_ids"][:tokens])[None]
    if ids.numel() < 2:
        raise ValueError("the text has no two tokens to compare models on")
    model = load_model(source, dtype="own", device=device)
    expected = _logits(model, ids)
    del model
    model = load_model(converted, dtype="own", device=device)
    if not isinstance(model, T2RForCausalLM):
        raise ValueError(f"{converted}: a {model.config.model_type} model, not a converted one")
    slots = _logits(model, ids)
    with model.softmax_attention():
        softmax = _logits(model, ids)
    spread, short = expected.std(), model.config.fewest_slots
    found = Verification(
        ids.numel(),
        ((softmax - expected).abs().max() / spread).item(),
        ((slots - expected)[:short].abs().max() / spread).item(),
        (slots.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    )
    if not found.softmax <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{converted}: with softmax attention its logits are {found.softmax:.3g} of their spread from those of "
            f"{source}; convert it again"
        )
    return found


def _logits(model, ids: Tensor) -> Tensor:
    """`[tokens, vocab]` in fp32, on the CPU."""
    return model(ids.to(model.device), use_cache=False).logits[0].float().cpu()
