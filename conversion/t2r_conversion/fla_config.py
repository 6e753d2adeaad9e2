"""flash-linear-attention's `GSAConfig`, to and from a T2R model's configuration.

Read from its sources: release 0.6.0, and what its repository held in September 2024, when the first GSA checkpoints
came out. Both are the paper start, but for options that `ONLY` lists.
"""

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any, NamedTuple

from t2r.model.configuration_t2r import LINEAR_ATTENTION, T2RConfig
from t2r_conversion.families import FAMILIES, makes_sense
from t2r_conversion.headers import one_line

GSA = FAMILIES["gsa"]
NORM_EPS = 1e-5  # of the norm before the output projection in 0.6.0, whatever `norm_eps` says
ATTN = {"num_heads": None, "num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}


class Field(NamedTuple):
    """A configuration field there and here, and its value in 0.6.0 where the file does not name it."""

    theirs: str
    ours: str
    default: Any
    optional: bool = False

    def read(self, raw: Mapping[str, Any]) -> Any:
        """Its value in a file; ValueError if that makes no sense."""
        value = raw.get(self.theirs, self.default)
        sound = makes_sense(self.ours, value)
        if value is None:
            sound = self.optional
        elif isinstance(self.default, float):
            sound = isinstance(value, int | float) and 0 < value < 1e9
        if not sound:
            raise ValueError(f"{self.theirs} is {value!r}, which makes no sense")
        return value


FIELDS = (
    Field("vocab_size", "vocab_size", 32000),
    Field("hidden_size", "hidden_size", 2048),
    Field("intermediate_size", "intermediate_size", None, optional=True),
    Field("num_hidden_layers", "num_hidden_layers", 24),
    Field("num_heads", "num_attention_heads", 4),
    Field("num_kv_heads", "num_key_value_heads", None, optional=True),
    Field("num_slots", "num_slots", 64, optional=True),
    Field("gate_logit_normalizer", "gate_logit_normalizer", 8.0),
    Field("max_position_embeddings", "max_position_embeddings", 2048),
    Field("norm_eps", "rms_norm_eps", 1e-6),
    Field("initializer_range", "initializer_range", 0.02),
    Field("use_cache", "use_cache", True),
    Field("pad_token_id", "pad_token_id", None, optional=True),
    Field("bos_token_id", "bos_token_id", 1, optional=True),
    Field("eos_token_id", "eos_token_id", 2, optional=True),
    Field("tie_word_embeddings", "tie_word_embeddings", False),
)

ONLY = {
    "feature_map": ("swish",),
    "hidden_act": ("swish", "silu"),
    "expand_k": (1,),
    "expand_v": (1,),
    "exapnd_k": (1,),  # as its constructor spells them
    "exapnd_v": (1,),
    "elementwise_affine": (True,),
    "use_norm": (True,),
    "use_output_gate": (False,),
    "use_short_conv": (False,),
    "use_rope": (False,),
    "clamp_min": (None,),
    "clamp_max": (None,),
    "attnres_block_size": (None,),
}
"""Values that the paper start can be, by field; the first is what a file that does not name the field means."""

WRITTEN = ("feature_map", "hidden_act", "expand_k", "expand_v", "elementwise_affine", "use_norm", "use_output_gate")
WRITTEN += ("use_short_conv",)

UNLIKE = {
    "window": "it rotates queries and keys, hides unwritten slots, and its gates follow a schedule",
    "routed": "it rotates queries and keys, hides unwritten slots, and routers choose the slots",
}
"""Why the other starts have no counterpart."""


def read_fla_config(raw: Mapping[str, Any], where: str) -> T2RConfig:
    """The configuration of a T2R model that is what a `config.json` of flash-linear-attention describes.

    Args:
        raw: its content.
        where: what to name in an error.

    Raises:
        ValueError: an option is set that the paper start is not (all of them are named), or a value makes no sense.
    """
    unlike = [name for name, values in ONLY.items() if name in raw and raw[name] not in values]
    if unlike:
        has, wanted = (", ".join(f"{name} {x[name]!r}" for name in unlike) for x in (raw, _firsts(unlike)))
        raise ValueError(f"{where}: {has} cannot be had in a T2R model; convert one that has {wanted}")
    try:
        values = {field.ours: field.read(raw) for field in FIELDS}
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if hidden % heads:
            raise ValueError(f"hidden_size {hidden} is no multiple of num_heads {heads}")
        values["head_dim"] = hidden // heads
        values["num_key_value_heads"] = values["num_key_value_heads"] or heads
        values["num_slots"] = values["num_slots"] or values["head_dim"]
        values["intermediate_size"] = values["intermediate_size"] or _intermediate_size(hidden, raw)
        # The norm took `norm_eps` in 2024; since it is fused with the projection, it takes that function's default.
        values["output_norm_eps"] = values["rms_norm_eps"] if "norm_first" in raw else NORM_EPS
        return T2RConfig(start="paper", **values | _softmax_layers(raw.get("attn"), values))
    except Exception as error:  # whatever transformers makes of fields that make no sense
        raise ValueError(f"{where}: {one_line(error)}") from error


def _firsts(names: Iterable[str]) -> dict[str, Any]:
    return {name: ONLY[name][0] for name in names}


def _intermediate_size(hidden_size: int, raw: Mapping[str, Any]) -> int:
    """Two thirds of `hidden_ratio` times the width, rounded up to a multiple of 256."""
    ratio = Field("hidden_ratio", "hidden_ratio", 4.0).read(raw) if raw.get("hidden_ratio") is not None else 4
    return 256 * ceil(int(hidden_size * ratio * 2 / 3) / 256)


def _softmax_layers(specs: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What `attn`, a mapping or a list of them, says of layers that are softmax attention."""
    if not specs:
        return {}
    specs = [ATTN | spec for spec in (specs if isinstance(specs, list) else [specs])]
    same = {"num_heads": values["num_attention_heads"], "num_kv_heads": values["num_key_value_heads"]}
    for spec in specs:
        spec["num_kv_heads"] = spec["num_kv_heads"] or spec["num_heads"]
        for name, own in {**same, "qkv_bias": False}.items():
            if spec[name] != own:
                raise ValueError(f"attn: {name} {spec[name]!r} cannot be had beside layers with {own!r}")
        for name in ("window_size", "rope_theta"):
            if spec[name] != specs[0][name]:
                raise ValueError(f"attn: {name} {specs[0][name]!r} and {spec[name]!r} cannot be had in one model")
    layers, count = [layer for spec in specs for layer in spec["layers"]], values["num_hidden_layers"]
    outside = [layer for layer in layers if layer not in range(count)]
    if outside:
        raise ValueError(f"attn: no layers {', '.join(map(str, outside))}; the model has 0 to {count - 1}")
    window = specs[0]["window_size"]
    theta = Field("rope_theta", "rope_theta", ATTN["rope_theta"]).read(specs[0])
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"attn: window_size is {window!r}, which makes no sense")
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "layer_types": [kind if layer in layers else LINEAR_ATTENTION for layer in range(count)],
        "sliding_window": window,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def as_fla_config(config: T2RConfig, where: str) -> dict[str, Any]:
    """The `config.json` of 0.6.0 that describes what a T2R model is.

    Args:
        config: of the T2R model.
        where: what to name in an error.

    Raises:
        ValueError: flash-linear-attention has no such model; it says why.
    """
    if config.start != "paper":
        raise ValueError(
            f"{where}: start {config.start!r} has no counterpart in flash-linear-attention: {UNLIKE[config.start]}; "
            "export a model of start 'paper'"
        )
    biases = ("attention_bias", "attention_out_bias", "qk_norm", "mlp_bias")
    unlike = [f"{name} {getattr(config, name)!r}" for name in biases if getattr(config, name)]
    if config.hidden_act not in ONLY["hidden_act"]:
        unlike.append(f"hidden_act {config.hidden_act!r}")
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        unlike.append(f"head_dim {config.head_dim!r} (not hidden_size / num_attention_heads)")
    attention = _attn_of(config, unlike)
    if unlike:
        raise ValueError(f"{where}: {', '.join(unlike)} cannot be had in flash-linear-attention")
    content = {field.theirs: getattr(config, field.ours) for field in FIELDS} | _firsts(WRITTEN)
    about = {"architectures": list(GSA.architectures), "model_type": GSA.model_type}
    if config.dtype is not None:
        about["dtype"] = str(config.dtype).removeprefix("torch.")
    return about | content | {"attn": attention}


def _attn_of(config: T2RConfig, unlike: list[str]) -> dict[str, Any] | None:
    """The counterpart of `_softmax_layers`; what has none is added to `unlike`."""
    kinds = set(config.layer_types) - {LINEAR_ATTENTION}
    if not kinds:
        return None
    if len(kinds) > 1:
        unlike.append("layer_types of several kinds of softmax attention")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        unlike.append(f"rope_type {rope['rope_type']!r}")
    return {
        "layers": [layer for layer, kind in enumerate(config.layer_types) if kind != LINEAR_ATTENTION],
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "qkv_bias": False,
        "window_size": config.sliding_window if kinds == {"sliding_attention"} else None,
        "rope_theta": rope["rope_theta"],
    }
