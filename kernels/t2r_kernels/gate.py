"""From the gate projection's output to log forget gates."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLATTEST = 1e-6  # slope of a gate by its logit, at least, where gradients are divided by it


class Gate(NamedTuple):
    """How logits become log forget gates: `logsigmoid(logits + base) / normalizer`.

    `base` is `-write_logit` on the slot that a token is to take over and `keep_logit` on the others.

    Attributes:
        slot: the slot that each token takes over, `[B, T, H]` int32 (may be expanded over heads). A negative one
            marks a place without a token: it keeps everything and writes nothing.
        write_logit: added, negated, to the logit of that slot.
        keep_logit: added to the logits of all others.
        normalizer: divides the log gate (the paper's temperature, arXiv 2409.07146, section 3.3).
    """

    slot: Tensor
    write_logit: float = 0.0
    keep_logit: float = 0.0
    normalizer: float = 1.0


def log_gate(logits: Tensor, gate: Gate) -> Tensor:
    """Log forget gates `[B, T, H, M]`, at most 0, of logits of the same shape; fp32, or fp64 if the logits are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slot = gate.slot.unsqueeze(-1)  # [B, T, H, 1]
    scheduled = torch.arange(logits.shape[-1], device=logits.device) == slot
    base = torch.where(scheduled, -gate.write_logit, gate.keep_logit)
    return (F.logsigmoid(logits + base) / gate.normalizer).masked_fill(slot < 0, 0.0)
