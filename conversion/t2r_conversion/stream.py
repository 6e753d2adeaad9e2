"""A text's way through a softmax model, one layer at a time: what its attention is like, and what slots hold of it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.heads import head_groups, in_order
from t2r.model.modeling_t2r import T2RAttention, T2RDecoderLayer, rotate
from t2r.model.positions import Positions
from t2r.model.routing import routed_schedule

Read = Callable[[str], Tensor]
"""Gives a tensor of the source by its name."""

Result = TypeVar("Result")


def where_it_fits(work: Callable[[torch.device], Result]) -> Result:
    """What some work gives on the GPU, or on the CPU where there is none or it is too full."""
    if torch.cuda.is_available():
        try:
            return work(torch.device("cuda"))
        except torch.OutOfMemoryError:
            warnings.warn("the GPU is too full to fit routers on; the CPU does it", stacklevel=2)
            torch.cuda.empty_cache()
    return work(torch.device("cpu"))


class Stream:
    """The hidden states of a text on their way through the layers. Memory holds one layer at a time.

    Attributes:
        config: of the source's own attention: softmax in all layers.
        hidden: of each window, `[L, hidden]` fp32: what comes into the layer that is next.
        rotation: cosines and sines of a window's positions.

    Args:
        config: of the converted model.
        read: gives the source's tensors.
        windows: tokens, `[windows, L]`.
        device: where.
    """

    def __init__(self, config: T2RConfig, read: Read, windows: Tensor, device: torch.device):
        self.config, self.read, self.device = copy(config), read, device
        self.config.layer_types = [config.softmax_type] * config.num_hidden_layers
        rope = Phi3RotaryEmbedding(config).to(device)
        self.rotation = rope(torch.zeros(1, device=device), torch.arange(windows.shape[1], device=device)[None])
        embedding = read("model.embed_tokens.weight")
        self.hidden = [embedding[row].float().to(device) for row in windows]

    def layers(self, count: int) -> Iterator[tuple[int, T2RDecoderLayer, list[Tensor]]]:
        """The first `count` layers, each with its number and with what its attention reads of each window."""
        for number in range(count):
            layer = self._layer(number)
            yield number, layer, [layer.input_layernorm(x) for x in self.hidden]

    def advance(self, layer: T2RDecoderLayer, inputs: list[Tensor], ends: Tensor | None = None) -> None:
        """Go through a layer.

        Args:
            layer: from `layers`, as the next.
            inputs: from there too.
            ends: until when slots hold each token, `[windows, L, H]`; None for softmax attention.
        """
        for i, x in enumerate(self.hidden):
            x = x + self.attend(layer.self_attn, inputs[i], None if ends is None else ends[i])
            self.hidden[i] = x + layer.mlp(layer.post_attention_layernorm(x))

    def attend(self, attention: T2RAttention, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Softmax attention of one window `[L, hidden]`, to all tokens or to those that slots hold until `ends`."""
        queries, outputs = torch.arange(len(x), device=x.device), []
        for head, (weights, v) in enumerate(self.heads(attention, x)):
            weights = weights if ends is None else held(weights, queries, ends[:, head])
            outputs.append((weights @ v).transpose(0, 1).flatten(1))  # [L, G * D]
        return attention.o_proj(torch.cat(outputs, 1))

    def heads(self, attention: T2RAttention, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Softmax attention of one window: weights `[G, L, L]` and values `[L, D]` of each key/value head."""
        config = self.config
        q, k, v = attention.project(x[None])
        (q, k), v = rotate(q, k, *self.rotation), v[0]
        behind = ahead(x)
        seen = behind >= 0
        if config.sliding_window is not None:
            seen &= behind < config.sliding_window
        group = config.num_attention_heads // config.num_key_value_heads
        for head in range(config.num_key_value_heads):
            queries = q[0, :, head * group : (head + 1) * group].transpose(0, 1)  # [G, L, D]
            logits = queries @ k[0, :, head].T * config.head_dim**-0.5  # [G, L, L]
            yield logits.masked_fill(~seen, float("-inf")).softmax(-1), v[:, head]

    def _layer(self, number: int) -> T2RDecoderLayer:
        with torch.device("meta"):
            layer = T2RDecoderLayer(self.config, number)
        prefix = f"model.layers.{number}."
        state = {name: self.read(prefix + name).float().to(self.device) for name in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer.eval()


def ahead(x: Tensor) -> Tensor:
    """How far each query of a window `[L, ...]` is ahead of each key, `[L, L]`."""
    places = torch.arange(len(x), device=x.device)
    return places[:, None] - places


def held(weights: Tensor, queries: Tensor, ends: Tensor) -> Tensor:
    """Attention `[G, Q, L]` to the tokens that slots still hold: queries are at `[Q]`, tokens end at `[L]`."""
    kept = weights * (queries[:, None] < ends)
    return kept / kept.sum(-1, keepdim=True).clamp_min(1e-9)


def held_until(importance: Tensor, config: T2RConfig, slots: Sequence[int]) -> Tensor:
    """The position at which each token's slot is taken over, L where it is not.

    Args:
        importance: the log of each token's, `[windows, L, H]`.
        config: of the converted model.
        slots: of each head.

    Returns:
        As `importance`, integers.
    """
    positions = Positions.resolve(importance[..., :1], None, None, None, 0)
    groups = head_groups(slots)
    taken = [taken for taken, _ in routed_schedule(importance, positions, config, groups)]
    return lifetimes(in_order(taken, groups))


def lifetimes(slots: Tensor) -> Tensor:
    """The position at which another token takes over each token's slot: `[..., L, H]` to the same, L for none."""
    L = slots.shape[-2]
    order = slots.argsort(stable=True, dim=-2)  # by slot, then by position
    of_slot = slots.gather(-2, order)
    successor = torch.full_like(order, L)
    same = of_slot[..., 1:, :] == of_slot[..., :-1, :]
    successor[..., :-1, :] = torch.where(same, order[..., 1:, :], L)
    return torch.empty_like(order).scatter_(-2, order, successor)
