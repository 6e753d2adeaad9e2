"""T2RConfig: the source model's shape, plus how its attention was replaced."""

import math
from os import PathLike

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .export import AUTO_MAP, write_code
from .heads import HeadGroup, head_groups

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_slots",
    "hybrid_window",
)
LINEAR_ATTENTION, HYBRID_ATTENTION = "linear_attention", "hybrid_sliding"
SLOT_ATTENTION = (LINEAR_ATTENTION, HYBRID_ATTENTION)
SOFTMAX_ATTENTION = ("full_attention", "sliding_attention")
SLOT_BYTES, INDEX_BYTES = 4, 4  # of a number in a slot, fp32 whatever the weights are; of a slot's number


class T2RConfig(PreTrainedConfig):
    """Configuration of a T2R model: the fields of a Llama-like source, and those of Gated Slot Attention.

    Args:
        attention_bias: whether q, k and v projections have a bias.
        attention_out_bias: whether the output projection has one.
        qk_norm: whether each head's queries and keys pass an RMSNorm of their own before they are rotated.
        sliding_window: window of the source's softmax attention in tokens, or None when it sees everything.
        layer_types: per layer, "linear_attention" (Gated Slot Attention), "hybrid_sliding" (the same beside a softmax
            window of `hybrid_window` tokens) or a kept softmax layer: "full_attention", or "sliding_attention" with
            `sliding_window`. When not given, all hybrid if `hybrid_window` is, all linear if not.
        hybrid_window: tokens of the softmax window beside the slots of hybrid layers.
        start: how the layers were started, "window", "routed" or "paper" (see `t2r.model.starts`).
        num_slots: slots M of each key/value head.
        slots_by_layer: window and routed start: the same for each layer, where layers differ, or for each key/value
            head of a layer, where these do; then `num_slots` is what the state of one that is as large has.
        num_sinks: window and routed start: slots that keep the first tokens for ever.
        gate_write_logit: these too: the scheduled slot's gate is `sigmoid(-gate_write_logit)` at the start.
        gate_keep_logit: these too: the other slots' gates are `sigmoid(gate_keep_logit)` at the start.
        gate_logit_normalizer: paper start: the temperature τ of the gates, `sigmoid(x) ** (1 / τ)`.
        output_norm_eps: paper start: epsilon of the norm before the output projection; None for `rms_norm_eps`.

    The remaining arguments are those of `transformers.LlamaConfig`.

    Raises:
        ValueError: slots do not exceed sinks, heads do not divide, or a layer type is not supported.
    """

    model_type = "t2r"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None

    layer_types: list[str] | None = None
    hybrid_window: int | None = None
    start: str = "window"
    num_slots: int = 64
    slots_by_layer: list[int | list[int]] | None = None
    num_sinks: int = 4
    gate_write_logit: float = 7.0
    gate_keep_logit: float = 12.0
    gate_logit_normalizer: float = 8.0
    output_norm_eps: float | None = None

    def __post_init__(self, **kwargs):
        for name in SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = LINEAR_ATTENTION if self.hybrid_window is None else HYBRID_ATTENTION
            self.layer_types = [kind] * self.num_hidden_layers
        self._check()
        super().__post_init__(**kwargs)
        rope = (self.rope_parameters or {}).get("rope_type", "default")
        if rope not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_type {rope!r} is not one that transformers knows: {', '.join(ROPE_INIT_FUNCTIONS)}")

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """As transformers does, and beside it the model's own code, for those who have no t2r (see `export`)."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        write_code(save_directory)

    @property
    def softmax_type(self) -> str:
        """The layer type of the source's own attention."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    @property
    def slot_layers(self) -> list[int]:
        """Numbers of the layers that have slots: the converted ones."""
        return [i for i, kind in enumerate(self.layer_types) if kind in SLOT_ATTENTION]

    def slots_of(self, layer: int) -> list[int]:
        """Slots of each key/value head of a layer."""
        slots = self.num_slots if self.slots_by_layer is None else self.slots_by_layer[layer]
        return slots if isinstance(slots, list) else [slots] * self.num_key_value_heads

    def head_groups(self, layer: int) -> list[HeadGroup]:
        """A layer's key/value heads by their slots, fewest first. Gates come in this order too, group after group."""
        return head_groups(self.slots_of(layer))

    @property
    def slots_of_heads(self) -> list[int]:
        """Slots of each key/value head that has them, layer after layer."""
        return [slots for layer in self.slot_layers for slots in self.slots_of(layer)]

    @property
    def fewest_slots(self) -> int:
        """Slots of the key/value head that has fewest: contexts that long are held whole."""
        return min(self.slots_of_heads, default=self.num_slots)

    @property
    def most_slots(self) -> int:
        """Slots of the key/value head that has most."""
        return max(self.slots_of_heads, default=self.num_slots)

    @property
    def slots_in_words(self) -> str:
        """Slots of each key/value head, for people."""
        fewest, most, slots = self.fewest_slots, self.most_slots, self.slots_of_heads
        return f"{most}" if fewest == most else f"{fewest} to {most} (mean {sum(slots) / len(slots):.1f})"

    def state_elements(self) -> int:
        """Numbers in the slots of one sequence, over all layers that have them (each of four bytes)."""
        about = 2 if self.start == "routed" else 0  # the worth and the position of what a slot holds
        return sum(self.slots_of_heads) * (2 * self.head_dim + about)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the recurrent state of one sequence: its slots, and the windows of hybrid layers.

        Args:
            itemsize: bytes of a number in the model's dtype, in which a window holds keys, values and gate logits.
        """
        hybrid = [i for i, kind in enumerate(self.layer_types) if kind == HYBRID_ATTENTION]
        slots = [slots for i in hybrid for slots in self.slots_of(i)]
        token = sum((2 * self.head_dim + n) * itemsize + INDEX_BYTES for n in slots)  # over heads
        return self.state_elements() * SLOT_BYTES + (self.hybrid_window or 0) * token

    def kv_cache_elements(self, num_tokens: int) -> int:
        """Numbers in the key/value cache of the kept softmax layers after `num_tokens` tokens of one sequence."""
        layers = len(self.layer_types) - len(self.slot_layers)
        held = num_tokens if self.sliding_window is None else min(num_tokens, self.sliding_window)
        return layers * self.num_key_value_heads * held * 2 * self.head_dim

    def _check(self) -> None:
        if self.start not in ("window", "routed", "paper"):
            raise ValueError(f"start must be 'window', 'routed' or 'paper', got {self.start!r}")
        for name in ("gate_write_logit", "gate_keep_logit", "gate_logit_normalizer"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not an activation that transformers knows")
        if self.slots_by_layer is not None:
            self._check_slots()
        if self.start != "paper" and not 0 <= self.num_sinks < self.num_slots:
            raise ValueError(
                f"num_sinks must be at least 0 and below num_slots, got num_sinks={self.num_sinks}, "
                f"num_slots={self.num_slots}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        unknown = sorted(set(self.layer_types) - {*SLOT_ATTENTION, *SOFTMAX_ATTENTION})
        if unknown:
            raise ValueError(f"layer_types: {', '.join(unknown)} not supported; use linear_attention or full_attention")
        if HYBRID_ATTENTION in self.layer_types and self.hybrid_window is None:
            raise ValueError("layer_types has hybrid_sliding layers, but hybrid_window is not set")
        if self.hybrid_window is not None and self.start == "paper":
            raise ValueError("a window beside the slots (hybrid_window) needs start 'window' or 'routed', got 'paper'")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention layers, but sliding_window is not set")

    def _check_slots(self) -> None:
        if self.start == "paper":
            raise ValueError("slots_by_layer needs start 'window' or 'routed', got 'paper'")
        if len(self.slots_by_layer) != self.num_hidden_layers:
            raise ValueError(
                f"slots_by_layer is of {len(self.slots_by_layer)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        counts = list(map(self.slots_of, range(self.num_hidden_layers)))
        wrong = [n for slots in counts for n in slots if type(n) is not int]
        if wrong:
            raise ValueError(f"slots_by_layer holds integers, or a list of them for a layer, got {wrong[0]!r}")
        heads = {len(slots) for slots in counts} - {self.num_key_value_heads}
        if heads:
            raise ValueError(
                f"slots_by_layer gives a layer slots for {heads.pop()} heads, num_key_value_heads is "
                f"{self.num_key_value_heads}"
            )
        fewest = min(map(min, counts))
        if fewest <= self.num_sinks:
            raise ValueError(
                f"slots_by_layer must be above num_sinks ({self.num_sinks}) in all layers, got {fewest} in one"
            )
