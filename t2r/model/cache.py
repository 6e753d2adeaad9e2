"""The decoding cache: slots of constant size for Gated Slot Attention, keys and values for kept softmax layers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from t2r_kernels import Held

from .configuration_t2r import HYBRID_ATTENTION, LINEAR_ATTENTION, T2RConfig
from .window import Tokens


class Slots(NamedTuple):
    """What slots hold of a layer's key/value heads that have as many of them. It never grows.

    Attributes:
        state: slot keys and values, `[B, heads, M, D]`.
        held: what the slots of a routed layer hold.
        recent: of a hybrid layer, `[B, window, ...]`: tokens that are not in slots yet.
    """

    state: tuple[Tensor, Tensor]
    held: Held | None = None
    recent: Tokens | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Slots":
        """The same with all tensors changed."""
        keys, values = map(change, self.state)
        held = None if self.held is None else Held(*map(change, self.held))
        return Slots((keys, values), held, None if self.recent is None else Tokens(*map(change, self.recent)))

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.state, *(self.held or ()), *(self.recent or ())]


class SlotCacheLayer(CacheLayerMixin):
    """One layer's slots.

    transformers knows cache layers that hold tokens and those that hold a state; this one holds a state and still
    counts tokens, which `generate` needs when no layer of the model holds any.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.cumulative_length = 0
        self.groups: list[Slots] = []  # by the heads' slots, as `T2RConfig.head_groups`; none before the first token

    @property
    def past(self) -> list[Slots]:
        """What earlier tokens left, to be written again."""
        if self.groups and self.groups[0].state[0].is_inference() and not torch.is_inference_mode_enabled():
            self._each(torch.clone)
        return self.groups

    def update(self, groups: list[Slots], num_tokens: int) -> None:
        """Keep the state that `num_tokens` more tokens have led to."""
        self.groups = groups
        self.dtype, self.device = groups[0].state[0].dtype, groups[0].state[0].device
        self.is_initialized = True
        self.cumulative_length += num_tokens

    def lazy_initialization(self, *args) -> None:
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
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the states of some sequences."""
        self._each(lambda x: x[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state of the one that it goes on from."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget everything."""
        self.groups, self.cumulative_length, self.is_initialized = [], 0, False

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the device."""
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.groups = [slots.each(change) for slots in self.groups]

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
        self.graph = None  # of decoding steps, see `graphs`

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.graph = None

    def tensors(self) -> list[Tensor]:
        """What all slots hold, layer after layer."""
        layers = (layer for layer in self.layers if isinstance(layer, SlotCacheLayer))
        return [x for layer in layers for slots in layer.past for x in slots.tensors()]

    def count(self, num_tokens: int) -> None:
        """Count tokens of which the state is here already."""
        for layer in self.layers:
            layer.cumulative_length += num_tokens
