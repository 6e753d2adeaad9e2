"""The source families, as data: which configuration fields and tensors a checkpoint has.

Source tensor names are kept in the converted model, so a family needs no table of renames (but for "gsa", whose table
is in `fla`). To add a family, add an entry to `FAMILIES`; its tensors' shapes are spelled in the symbols of `_sizes`,
its optional ones in the conditions of `_conditions`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, NamedTuple

from t2r.model.configuration_t2r import LINEAR_ATTENTION, T2RConfig
from t2r_conversion.headers import SourceTensor, one_line, parts_of


class TensorRow(NamedTuple):
    """A tensor name (`{layer}` stands for each layer's number), its symbolic shape, and when it is there."""

    name: str
    shape: tuple[str, ...]
    when: str = "always"


_LAYER = "model.layers.{layer}."

LLAMA_TENSORS = (
    TensorRow("model.embed_tokens.weight", ("vocab", "hidden")),
    TensorRow(_LAYER + "input_layernorm.weight", ("hidden",)),
    TensorRow(_LAYER + "self_attn.q_proj.weight", ("query", "hidden")),
    TensorRow(_LAYER + "self_attn.q_proj.bias", ("query",), "attention_bias"),
    TensorRow(_LAYER + "self_attn.k_proj.weight", ("key_value", "hidden")),
    TensorRow(_LAYER + "self_attn.k_proj.bias", ("key_value",), "attention_bias"),
    TensorRow(_LAYER + "self_attn.v_proj.weight", ("key_value", "hidden")),
    TensorRow(_LAYER + "self_attn.v_proj.bias", ("key_value",), "attention_bias"),
    TensorRow(_LAYER + "self_attn.q_norm.weight", ("head",), "qk_norm"),
    TensorRow(_LAYER + "self_attn.k_norm.weight", ("head",), "qk_norm"),
    TensorRow(_LAYER + "self_attn.o_proj.weight", ("hidden", "query")),
    TensorRow(_LAYER + "self_attn.o_proj.bias", ("hidden",), "attention_out_bias"),
    TensorRow(_LAYER + "post_attention_layernorm.weight", ("hidden",)),
    TensorRow(_LAYER + "mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorRow(_LAYER + "mlp.gate_proj.bias", ("intermediate",), "mlp_bias"),
    TensorRow(_LAYER + "mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorRow(_LAYER + "mlp.up_proj.bias", ("intermediate",), "mlp_bias"),
    TensorRow(_LAYER + "mlp.down_proj.weight", ("hidden", "intermediate")),
    TensorRow(_LAYER + "mlp.down_proj.bias", ("hidden",), "mlp_bias"),
    TensorRow("model.norm.weight", ("hidden",)),
    TensorRow("lm_head.weight", ("vocab", "hidden"), "untied"),
)

# Old checkpoints hold the rotary frequencies as buffers; a tied head is the embedding a second time.
LLAMA_DROPPED = ("*.rotary_emb.inv_freq", "lm_head.weight")

GSA_TENSORS = (
    *LLAMA_TENSORS,
    TensorRow(_LAYER + "self_attn.f_proj.weight", ("gates", "hidden"), "linear_attention"),
    TensorRow(_LAYER + "self_attn.g_norm.weight", ("query",), "linear_attention"),
)


@dataclass(frozen=True)
class Family:
    """What the converter knows about one kind of source model.

    Attributes:
        model_type: the source's `model_type`.
        architectures: classes whose checkpoints can be converted.
        config_fields: for each source configuration field, the `T2RConfig` fields it sets.
        gguf_architecture: the name of the family in GGUF files, if it has one there.
        fixed: `T2RConfig` fields that every model of the family has in common.
        tensors: the tensors that are kept.
        dropped: patterns of names that are known and not kept; a row of `tensors` goes first.
        fused: modules whose weights the source holds as one, and what its rows are, in order.
    """

    model_type: str
    architectures: tuple[str, ...]
    config_fields: Mapping[str, tuple[str, ...]]
    gguf_architecture: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorRow, ...] = LLAMA_TENSORS
    dropped: tuple[str, ...] = LLAMA_DROPPED
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def recurrent(self) -> bool:
        """Whether its layers are Gated Slot Attention already."""
        return "start" in self.config_fields

    def config_values(self, source_config: Any) -> dict[str, Any]:
        """The `T2RConfig` arguments that follow from the source's configuration.

        Raises:
            ValueError: some layers have a sliding window and others have none, or a size is no size.
        """
        values = dict(self.fixed)
        for name in MOST:
            size = getattr(source_config, name, None)
            if not makes_sense(name, size):
                raise ValueError(f"{name} of the source's configuration is {size!r}, which makes no sense")
        for name, targets in self.config_fields.items():
            values.update(dict.fromkeys(targets, getattr(source_config, name)))
        types = set(getattr(source_config, "layer_types", None) or ()) - {LINEAR_ATTENTION}
        if len(types) > 1:
            raise ValueError(
                f"{self.model_type}: layers of several kinds ({', '.join(sorted(types))}) are not supported"
            )
        if types == {"full_attention"}:
            values["sliding_window"] = None
        return values

    def expected_tensors(self, config: T2RConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every source tensor that a model of this configuration keeps."""
        sizes, conditions = _sizes(config), _conditions(config)
        linear = config.slot_layers
        expected = {}
        for row in self.tensors:
            layers = range(config.num_hidden_layers) if "{layer}" in row.name else [0]
            if row.when == LINEAR_ATTENTION:
                layers = linear
            elif not conditions[row.when]:
                continue
            shape = tuple(sizes[symbol] for symbol in row.shape)
            expected.update({row.name.format(layer=layer): shape for layer in layers})
        return expected

    def stored_name(self, name: str) -> str:
        """The name of the source's tensor that holds one of the model's."""
        return _replaced(name, {part: fused for fused, parts in self.fused.items() for part in parts})

    def taken_apart(self, tensors: Mapping[str, SourceTensor], source_config: Any) -> dict[str, SourceTensor]:
        """Headers of the model's tensors, where the source holds some of them as one.

        Raises:
            ValueError: the configuration makes no sense.
        """
        if not self.fused:
            return dict(tensors)
        try:
            expected = self.expected_tensors(T2RConfig(**self.config_values(source_config)))
        except Exception as error:  # whatever transformers makes of fields that make no sense
            raise ValueError(one_line(error)) from error
        rows: dict[str, dict[str, int]] = {}
        for name, shape in expected.items():
            rows.setdefault(self.stored_name(name), {})[name] = shape[0]
        apart = {}
        for name, header in tensors.items():
            apart |= parts_of(name, header, rows.get(name, {name: 0}))
        return apart

    def drops(self, name: str) -> bool:
        """Whether a tensor that is not expected is known and left out."""
        return any(fnmatch(name, pattern) for pattern in self.dropped)


def _replaced(name: str, modules: Mapping[str, str]) -> str:
    """A tensor's name with another module in it."""
    *path, module, kind = name.rsplit(".", 2)
    return ".".join([*path, modules.get(module, module), kind])


def _sizes(config: T2RConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "query": config.num_attention_heads * config.head_dim,
        "key_value": config.num_key_value_heads * config.head_dim,
        "head": config.head_dim,
        "gates": config.num_key_value_heads * config.num_slots,
    }


def _conditions(config: T2RConfig) -> dict[str, bool]:
    return {
        "always": True,
        "untied": not config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.attention_out_bias,
        "qk_norm": config.qk_norm,
        "mlp_bias": config.mlp_bias,
    }


MOST = {
    "vocab_size": 2**31,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "num_slots": 2**16,
}
"""Sizes beyond which a configuration is damaged, and would cost memory before it is found to be."""


def makes_sense(name: str, size: Any) -> bool:
    """Whether a field's value is a size that a model may have, if the field is one of sizes; None is."""
    return name not in MOST or size is None or (type(size) is int and 0 < size <= MOST[name])


COMMON_FIELDS = {
    name: (name,)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_dropout",
    )
}

GSA_FIELDS = ("start", "num_slots", "layer_types", "sliding_window", "gate_logit_normalizer", "output_norm_eps")

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architectures=("LlamaForCausalLM",),
            config_fields={
                **COMMON_FIELDS,
                "attention_bias": ("attention_bias", "attention_out_bias"),
                "mlp_bias": ("mlp_bias",),
            },
            gguf_architecture="llama",
        ),
        Family(
            model_type="mistral",
            architectures=("MistralForCausalLM",),
            config_fields={**COMMON_FIELDS, "sliding_window": ("sliding_window",)},
            fixed={"attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
            gguf_architecture="llama",
        ),
        Family(
            model_type="qwen2",
            architectures=("Qwen2ForCausalLM",),
            config_fields={
                **{name: targets for name, targets in COMMON_FIELDS.items() if name != "head_dim"},
                "sliding_window": ("sliding_window",),
            },
            fixed={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            gguf_architecture="qwen2",
        ),
        Family(
            model_type="qwen3",
            architectures=("Qwen3ForCausalLM",),
            config_fields={
                **COMMON_FIELDS,
                "attention_bias": ("attention_bias", "attention_out_bias"),
                "sliding_window": ("sliding_window",),
            },
            fixed={"qk_norm": True, "mlp_bias": False},
            gguf_architecture="qwen3",
        ),
        Family(
            model_type="phi3",
            architectures=("Phi3ForCausalLM",),
            config_fields={
                **{name: targets for name, targets in COMMON_FIELDS.items() if name != "head_dim"},
                "sliding_window": ("sliding_window",),
            },
            fixed={"attention_bias": False, "attention_out_bias": False, "mlp_bias": False},
            gguf_architecture="phi3",
            fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
        ),
        Family(  # flash-linear-attention's; `fla_config` makes a `T2RConfig` of its configuration
            model_type="gsa",
            architectures=("GSAForCausalLM",),
            config_fields={name: (name,) for name in (*COMMON_FIELDS, *GSA_FIELDS)},
            tensors=GSA_TENSORS,
            dropped=(*LLAMA_DROPPED, "*.rotary.inv_freq"),
        ),
    )
}


def family_of(model_type: str | None, architectures: list[str] | None, where: str) -> Family:
    """The family of a checkpoint.

    Args:
        model_type: `model_type` of its configuration.
        architectures: `architectures` of its configuration; None or empty passes.
        where: what to name in an error.

    Raises:
        ValueError: the family is not supported, or the checkpoint is not of a causal language model.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    named = set(map(str, architectures)) if isinstance(architectures, list) else {str(architectures)}
    if architectures and not named & set(family.architectures):
        raise ValueError(
            f"{where}: architectures is {architectures}; convert a checkpoint of {' or '.join(family.architectures)}"
        )
    return family
