"""Gated Slot Attention, the operator: `gsa` for whole sequences, `gsa_step` for one token."""

from t2r_kernels.api import BACKENDS, gsa, gsa_step, resolve_backend
from t2r_kernels.state import SlotState, zero_state

__all__ = ["BACKENDS", "SlotState", "gsa", "gsa_step", "resolve_backend", "zero_state"]
