"""The T2R network: a Llama-like decoder whose attention is Gated Slot Attention, softmax, or either on demand."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from t2r_kernels import Held, gsa, gsa_step, straight_through

from .cache import Slots, T2RCache
from .configuration_t2r import HYBRID_ATTENTION, SLOT_ATTENTION, T2RConfig
from .graphs import NotCapturable, graphed, takes_graph
from .heads import HeadGroup, in_order, of_group
from .packed import attend_by_document, attends_by_document
from .positions import Positions
from .routing import TEMPERATURE, Router, routed_schedule
from .starts import STARTS, gate_of, slot_schedule
from .window import Tokens, joined, window_attention

logger = logging.get_logger(__name__)

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}

# The first call of these in a process can be imprecise when several threads make it (pytorch/pytorch#188792).
for function in (torch.cos, torch.sin, torch.exp, torch.expm1, torch.sigmoid):
    function(torch.ones(1))


class GateProjection(nn.Linear):
    """The forget gates' projection: a class of its own so that initialisation knows it.

    While it trains, it is fp32 in a model that may be bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., heads * slots]`, in the dtype of the weight, or of autocast."""
        return super().forward(x if torch.is_autocast_enabled(x.device.type) else x.to(self.weight.dtype))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys `[B, T, heads, D]`.

    Cosines and sines are `[B, T, D]`, or `[B, T, R]` where the first R numbers of a head turn and the others stay.
    """
    apply = apply_rotary_pos_emb if cos.shape[-1] == q.shape[-1] else apply_partial_rotary_pos_emb
    return apply(q, k, cos, sin, unsqueeze_dim=2)


class LanguageModelHead(nn.Linear):
    """Hidden states to logits."""

    def forward(self, hidden_states: Tensor, loss: Callable[[nn.Linear, Tensor], Tensor] | None = None) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`; or what `loss` makes of this head and the hidden states.

        That is computed in here since here alone sharded weights are sure to be at hand.
        """
        return super().forward(hidden_states) if loss is None else loss(self, hidden_states)


class T2RAttention(nn.Module):
    """One attention layer: the source's projections, read by Gated Slot Attention or by softmax attention.

    A converted layer (`linear_attention`, or `hybrid_sliding` with a softmax window beside its slots) also has a gate
    projection `f_proj`, and can be switched to the softmax attention that it came from by setting `kind`.
    """

    rotate = staticmethod(rotate)

    def __init__(self, config: T2RConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.kind, self.groups = config.layer_types[layer_idx], config.head_groups(layer_idx)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        D, HQ, H = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, HQ * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, H * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, H * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(HQ * D, config.hidden_size, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(D, eps=config.rms_norm_eps)
        if self.kind in SLOT_ATTENTION:
            self.start = STARTS[config.start]
            gates = sum(config.slots_of(layer_idx))
            self.f_proj = GateProjection(config.hidden_size, gates, bias=self.start.gate_bias)
            if self.start.routed:
                self.router = Router(config)
            if self.start.output_norm:
                eps = config.rms_norm_eps if config.output_norm_eps is None else config.output_norm_eps
                self.g_norm = LlamaRMSNorm(HQ * D, eps=eps)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, hidden]
        positions: Positions,
        slots: dict[int, Tensor],  # by their number: [B, T], the slot that each token takes over, unless routed
        rope: tuple[Tensor, Tensor],  # cos and sin, [B, T, D]
        attention_mask: Tensor | None,  # of this layer's kind, for softmax
        past_key_values: T2RCache | None,
        **kwargs,
    ) -> Tensor:
        """Attend. Returns `[B, T, hidden]`."""
        q, k, v = self.project(hidden_states)
        if self.kind in SLOT_ATTENTION:
            o = self._slots(hidden_states, q, k, v, positions, slots, rope, past_key_values)
        else:
            o = self._softmax(q, k, v, positions, rope, attention_mask, past_key_values, **kwargs)
        return self.o_proj(o)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, HQ, D]`, keys and values `[B, T, H, D]`, not rotated yet."""
        B, T, _ = hidden_states.shape
        q, k, v = (x(hidden_states).view(B, T, -1, self.head_dim) for x in (self.q_proj, self.k_proj, self.v_proj))
        return (self.q_norm(q), self.k_norm(k), v) if self.config.qk_norm else (q, k, v)

    def _slots(self, hidden_states, q, k, v, positions, slots, rope, past_key_values) -> Tensor:
        start = self.start
        if start.rope:
            q, k = (x.to(v.dtype) for x in self.rotate(q, k, *rope))
        if start.swish:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        past = [] if layer is None else layer.past
        outputs, kept = [], []
        written = self.schedule(hidden_states, positions, slots, past)
        for (group, logits, taken, held), before in zip(written, past or [None] * len(self.groups), strict=True):
            of_q, of_k, of_v = (of_group(x, group, k.shape[2]) for x in (q, k, v))
            tokens = Tokens(of_k, of_v, logits, taken)
            o, state, recent = self._attend(of_q, tokens, positions, before, keep=layer is not None)
            outputs.append(o)
            kept.append(Slots(state, held, recent))
        if layer is not None:
            layer.update(kept, q.shape[1])
        o = in_order(outputs, self.groups).flatten(2)  # [B, T, HQ * D]
        if start.swish:
            o = F.silu(o)
        return self.g_norm(o).to(o.dtype) if start.output_norm else o

    def _attend(
        self, q: Tensor, tokens: Tokens, positions: Positions, past: Slots | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tokens | None]:
        """Attention of some heads. Returns their output `[B, T, heads, D]`, state and window afterwards."""
        config, offset, recent, window = self.config, positions.offset, None, None
        if self.kind == HYBRID_ATTENTION:
            recent = tokens.after(past and past.recent, config.hybrid_window)
            window = window_attention(q, recent.keys, recent.values, positions.ids)
            tokens, offset = recent.leaving(positions.ids, positions.padding), offset - config.hybrid_window
        options = {
            "gate": gate_of(tokens.slots, config),
            "scale": self.start.scale,
            "hide_unwritten": self.start.hide_unwritten,
            "position_offset": offset,
            "output_lse": window is not None,
        }
        if past is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            o, state, *lse = gsa_step(q, *tokens[:3], past.state, **options)
        else:
            o, state, *lse = gsa(
                q, *tokens[:3],
                initial_state=past and past.state, output_final_state=keep, cu_seqlens=positions.cu_seqlens, **options,
            )  # fmt: skip
        if window is not None:
            o = joined(o, *lse, *window)
        return o, state, recent and recent.last(config.hybrid_window, positions.padding)

    def schedule(
        self,
        hidden_states: Tensor,
        positions: Positions,
        slots: dict[int, Tensor] | None,
        past: Sequence[Slots] = (),
    ) -> Iterator[tuple[HeadGroup, Tensor, Tensor, Held | None]]:
        """What is written where: for heads with as many slots as one another, gate logits `[B, T, heads, M]`, the slot
        that each token takes over, `[B, T, heads]`, and what slots then hold.

        A routed layer chooses slots by what they hold. Arguments as for `forward`; `past` is what slots held before.
        """
        importance = self.router(hidden_states) if self.start.routed else None  # [B, T, H]
        if self.start.routed:
            before = [group.held for group in past]
            taken = routed_schedule(importance, positions, self.config, self.groups, before)
        else:
            taken = [(slots[n].unsqueeze(-1).expand(-1, -1, len(heads)), None) for n, heads in self.groups]
        sizes = [group.num_slots * len(group.heads) for group in self.groups]
        logits = self.f_proj(hidden_states).split(sizes, -1)
        for group, x, (slot, held) in zip(self.groups, logits, taken, strict=True):
            x = x.unflatten(-1, (-1, group.num_slots))
            if importance is not None and importance.requires_grad and not past:
                of_heads = of_group(importance, group, importance.shape[2])
                about = gate_of(slot, self.config), positions.ids, self.config.num_sinks, TEMPERATURE
                x = straight_through(x, of_heads, *about)
            yield group, x, slot, held

    def _softmax(self, q, k, v, positions, rope, attention_mask, past_key_values, **kwargs) -> Tensor:
        q, k = self.rotate(q, k, *rope)
        window = self.config.sliding_window if self.kind == "sliding_attention" else None
        if attends_by_document(q, positions, self.config):
            return attend_by_document(q, k, v, positions, window).flatten(2)  # [1, T, HQ * D]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H(Q), T, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        o, _ = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training and torch.is_grad_enabled() else 0.0,  # no teacher's
            scaling=self.head_dim**-0.5,
            sliding_window=window,
            position_ids=positions.ids,
            **kwargs,
        )
        return o.flatten(2)  # [B, T, HQ * D]


class T2RDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, config: T2RConfig, layer_idx: int):
        super().__init__()
        self.self_attn = T2RAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """`[B, T, hidden]` to `[B, T, hidden]`."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class T2RPreTrainedModel(PreTrainedModel):
    """What T2R models share: initialisation, and the switch back to softmax attention."""

    config_class = T2RConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["T2RDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": T2RDecoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GateProjection):
            init.normal_(module.weight, std=STARTS[self.config.start].gate_std)
        elif isinstance(module, Router):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    @contextmanager
    def softmax_attention(self, only: Collection[int] | None = None) -> Iterator[None]:
        """Within the context every converted layer is the softmax attention that it came from.

        The projections are the student's own: with adapters off and the base frozen, this is the teacher.

        Args:
            only: numbers of the layers that change; None for all.
        """
        layers = [m.self_attn for i, m in enumerate(self.base_model.layers) if only is None or i in only]
        converted = [(attention, attention.kind) for attention in layers if attention.kind in SLOT_ATTENTION]
        for attention, _ in converted:
            attention.kind = self.config.softmax_type
        try:
            yield
        finally:
            for attention, kind in converted:
                attention.kind = kind


class T2RModel(T2RPreTrainedModel):
    """Embeddings, decoder layers and the final norm.

    Attributes:
        cuda_graphs: decode as CUDA graphs where that goes (see `graphs`).
    """

    cuda_graphs = True

    def __init__(self, config: T2RConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(T2RDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3RotaryEmbedding(config)  # Llama's, which may turn a part of each head alone
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def layer_kinds(self) -> list[str]:
        """What each layer does now: its layer type, or softmax within `softmax_attention()`."""
        return [layer.self_attn.kind for layer in self.layers]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: T2RCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, T]`, or `inputs_embeds`, `[B, T, hidden]`.
            attention_mask: `[B, past + T]`, 0 where padded.
            position_ids: `[B, T]`, position of each token in its own document.
            past_key_values: what earlier tokens left.
            inputs_embeds: in place of `input_ids`.
            use_cache: return a cache (never for packed documents).
            cu_seqlens: `[N + 1]`, bounds of packed documents (B = 1); found from restarting `position_ids`
                when not given.
            max_seqlen: tokens of the longest packed document; softmax layers are faster for it.

        Raises:
            ValueError: the arguments contradict each other, or the cache is not a `T2RCache` for these layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        self._check_cache(past_key_values)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = Positions.resolve(hidden_states, attention_mask, position_ids, cu_seqlens, past, max_seqlen)
        if past and HYBRID_ATTENTION in self.layer_kinds and positions.begins_late():
            raise ValueError("padding between tokens that a window holds and those that come; pad on the right")
        if use_cache and past_key_values is None and positions.cu_seqlens is None:
            past_key_values = T2RCache(self.config, self.layer_kinds)
        masks = self._softmax_masks(hidden_states, attention_mask, positions, past_key_values)
        rope = self.rotary_emb(hidden_states, position_ids=positions.ids)
        options = {"output_hidden_states": self.config.output_hidden_states} | kwargs
        if self.cuda_graphs and takes_graph(self.config.head_dim, past_key_values, hidden_states, options):
            try:
                last = self._step(hidden_states, positions, rope, past_key_values)
                return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values)
            except NotCapturable as error:
                self.cuda_graphs = False
                logger.warning(f"decoding goes on without CUDA graphs: {error}")
        elif past_key_values is not None:
            past_key_values.graph = None  # whatever else changes between a prompt and the next is seen
        last = self._through_layers(hidden_states, positions, rope, past_key_values, masks, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values)

    def _step(
        self, hidden_states: Tensor, positions: Positions, rope: tuple[Tensor, Tensor], cache: T2RCache
    ) -> Tensor:
        """As `_through_layers` for one token of each sequence, as a CUDA graph."""

        def step(hidden_states, cos, sin, ids, offset, padding=None):
            return self._through_layers(hidden_states, Positions(ids, offset, padding), (cos, sin), cache, {})

        padding = [] if positions.padding is None else [positions.padding]
        return graphed(self, step, [hidden_states, *rope, positions.ids, positions.offset, *padding], cache)

    def _through_layers(
        self,
        hidden_states: Tensor,
        positions: Positions,
        rope: tuple[Tensor, Tensor],
        past_key_values: T2RCache | None,
        masks: dict[str, Tensor | None],
        **kwargs,
    ) -> Tensor:
        """All layers and the final norm, `[B, T, hidden]`."""
        counts = {group.num_slots for layer in self.layers for group in layer.self_attn.groups}
        schedules = {count: slot_schedule(positions, self.config, count) for count in counts}
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                positions=positions,
                slots=schedules,
                rope=rope,
                attention_mask=masks.get(layer.self_attn.kind),
                past_key_values=past_key_values,
                **kwargs,
            )
        return self.norm(hidden_states)

    def _softmax_masks(self, inputs_embeds, attention_mask, positions, past_key_values) -> dict[str, Tensor | None]:
        if attends_by_document(inputs_embeds, positions, self.config):
            return {}
        return {
            kind: MASKS[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=positions.ids,
            )
            for kind in set(self.layer_kinds) - set(SLOT_ATTENTION)
        }

    def _check_cache(self, cache) -> None:
        if cache is not None and getattr(cache, "layer_types", None) != self.layer_kinds:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} that does not fit these layers; pass none, or a T2RCache"
            )


class T2RForCausalLM(T2RPreTrainedModel, GenerationMixin):
    """A T2R model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: T2RConfig):
        super().__init__(config)
        self.model = T2RModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take another head: a plain one, if transformers has resized the vocabulary."""
        super().set_output_embeddings(new_embeddings)
        self.lm_head.__class__ = LanguageModelHead

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: T2RCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        loss_from_hidden: Callable[[nn.Linear, Tensor], Tensor] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict next tokens. Arguments as `T2RModel.forward`, and:

        Args:
            labels: `[B, T]` token ids, -100 where there is nothing to learn; shifted here.
            logits_to_keep: logits of this many last positions only (0 for all), or of the positions named.
            skip_logits: compute no logits; `hidden_states` then holds the last hidden state alone.
            loss_from_hidden: computes `loss` from the head and the last hidden states, in place of logits: for losses
                that go through the vocabulary in pieces. It takes the head's weight, and does not call it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # [B, T, hidden]
        if loss_from_hidden is not None:
            loss = self.lm_head(hidden_states, loss_from_hidden)
            return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)
        if skip_logits:
            return CausalLMOutputWithPast(past_key_values=outputs.past_key_values, hidden_states=(hidden_states,))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep])  # [B, T', vocab]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:  # noqa: ARG002
        """Give `generate` our cache: transformers' own has no layer for slots that counts tokens."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported: "
                "a T2R model's state has a constant size already; leave it unset"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = T2RCache(self.config, self.model.layer_kinds)


__all__ = ["T2RConfig", "T2RForCausalLM", "T2RModel", "T2RPreTrainedModel"]
