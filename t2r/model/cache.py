"""The decoding cache: slots of constant size for Gated Slot Attention, keys and values for kept softmax layers."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from t2r_kernels import Held

from .configuration_t2r import HYBRID_ATTENTION, LINEAR_ATTENTION, T2RConfig
from .window import Tokens


class SlotCacheLayer(CacheLayerMixin):
    """One layer's slots. `keys` and `values` are the operator's state, `[B, H, M, D]`, and never grow.

    transformers knows cache layers that hold tokens and those that hold a state; this one holds a state and still
    counts tokens, which `generate` needs when no layer of the model holds any.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.cumulative_length = 0
        self.held: Held | None = None  # what the slots of a routed layer hold
        self.recent: Tokens | None = None  # [B, window, ...], of a hybrid layer: not in slots yet

    @property
    def state(self) -> tuple[Tensor, Tensor] | None:
        """Slot keys and values, or None before the first token."""
        if self.cumulative_length and self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()  # to be written again, outside that mode
        return (self.keys, self.values) if self.cumulative_length else None

    def update(self, key_states, value_states, *args, num_tokens: int, held=None, recent=None, **kwargs):  # noqa: ARG002
        """Keep the state that `num_tokens` more tokens have led to."""
        self.keys, self.values, self.held, self.recent = key_states, value_states, held, recent
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self.cumulative_length += num_tokens
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first state comes whole."""

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The lengths a softmax mask over all tokens seen would have."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence's state."""
        if self.is_initialized:
            self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the states of some sequences."""
        if self.is_initialized:
            self._each(lambda x: x[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state of the one that it goes on from."""
        if self.is_initialized:
            self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.held = self.recent = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.held = None if self.held is None else Held(*map(change, self.held))
        self.recent = None if self.recent is None else Tokens(*map(change, self.recent))

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot be rolled back.

        Raises:
            RuntimeError: always, as transformers' own recurrent layers do.
        """
        raise RuntimeError(
            f"cannot remove {abs(tokens_to_remove)} tokens: a recurrent state keeps no tokens to go back to"
        )


class T2RCache(Cache):
    """The cache of a T2R model: per layer, slots or (for softmax layers) keys and values.

    Args:
        config: the model's configuration.
        layer_types: what each layer does, if not what the configuration says (all softmax for the teacher).
    """

    def __init__(self, config: T2RConfig, layer_types: list[str] | None = None):
        self.layer_types = list(layer_types or config.layer_types)
        make = {
            LINEAR_ATTENTION: SlotCacheLayer,
            HYBRID_ATTENTION: SlotCacheLayer,
            "full_attention": DynamicLayer,
            "sliding_attention": lambda: DynamicSlidingWindowLayer(config.sliding_window),
        }
        super().__init__(layers=[make[kind]() for kind in self.layer_types])
