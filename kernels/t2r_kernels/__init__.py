"""Gated Slot Attention, the operator: `gsa` for whole sequences, `gsa_step` for one token; `evict` chooses slots."""

from t2r_kernels.api import BACKENDS, gsa, gsa_step, resolve_backend, takes_triton
from t2r_kernels.choice import straight_through
from t2r_kernels.evict import Held, evict, evict_groups
from t2r_kernels.gate import Gate, log_gate
from t2r_kernels.state import SlotState, zero_state

__all__ = [
    "BACKENDS",
    "Gate",
    "Held",
    "SlotState",
    "evict",
    "evict_groups",
    "gsa",
    "gsa_step",
    "log_gate",
    "resolve_backend",
    "straight_through",
    "takes_triton",
    "zero_state",
]
