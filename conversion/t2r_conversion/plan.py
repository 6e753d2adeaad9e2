"""What a conversion will do, worked out from headers alone: no tensor is read."""

import warnings
from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass, replace
from math import prod
from statistics import fmean
from typing import Any

import torch

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.starts import new_tensors
from t2r_conversion.headers import DTYPES, SourceTensor, one_line
from t2r_conversion.source import Source

CACHE_LENGTHS = (2048, 32768)
DEFAULT_SLOTS = 64


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source or of the converted model.

    Attributes:
        name: its name.
        action: "copied", "new" or "dropped".
        shape: its shape.
        dtype: its dtype as safetensors spells it.
        parameters: number of elements.
        bytes: size in bytes.
        shard: the source file that holds it; None for a new one.
        mean: of a new tensor's values.
        std: of a new tensor's values.
    """

    name: str
    action: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    shard: str | None
    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A conversion: the source, the configuration to write, and what becomes of each tensor."""

    source: Source
    config: T2RConfig
    dtype: torch.dtype
    tensors: tuple[PlannedTensor, ...]

    def having(self, *actions: str) -> list[PlannedTensor]:
        """The tensors with one of these actions."""
        return [tensor for tensor in self.tensors if tensor.action in actions]

    def totals(self) -> dict[str, dict[str, int]]:
        """Tensors, parameters and bytes of each action."""
        return {
            action: {
                "tensors": len(chosen),
                "parameters": sum(tensor.parameters for tensor in chosen),
                "bytes": sum(tensor.bytes for tensor in chosen),
            }
            for action in ("copied", "new", "dropped")
            for chosen in [self.having(action)]
        }

    def memory(self, lengths: Iterable[int] = CACHE_LENGTHS) -> list[dict[str, int]]:
        """Bytes that one sequence holds after so many tokens: the converted model's, and the source's KV cache.

        Slots are fp32; windows beside them and key/value caches are in the source's dtype. A recurrent source holds
        what the converted model holds.
        """
        state = self.config.state_bytes(self.dtype.itemsize)
        source = _all_softmax(self.config)
        rows = []
        for tokens in lengths:
            kept = self.config.kv_cache_elements(tokens) * self.dtype.itemsize
            cache = source.kv_cache_elements(tokens) * self.dtype.itemsize
            cache = state + kept if self.source.family.recurrent else cache
            rows.append({"tokens": tokens, "state": state, "kept_cache": kept, "source_cache": cache})
        return rows

    def summary(self) -> dict[str, Any]:
        """The plan without its list of tensors, ready for JSON."""
        config = self.config
        softmax = sorted(set(range(config.num_hidden_layers)) - set(config.slot_layers))
        return {
            "source": self.source.name,
            "family": self.source.family.model_type,
            "license": self.source.license,
            "start": config.start,
            "num_slots": config.num_slots,
            **({} if config.slots_by_layer is None else {"slots_by_layer": config.slots_by_layer}),
            "num_sinks": config.num_sinks,
            **({} if config.hybrid_window is None else {"window": config.hybrid_window}),
            "gate_write_logit": config.gate_write_logit,
            "gate_keep_logit": config.gate_keep_logit,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layer_types": dict(Counter(config.layer_types)),
            "keep_softmax": softmax,
            "totals": self.totals(),
            "memory": self.memory(),
        }

    def as_dict(self) -> dict[str, Any]:
        """The whole plan, ready for JSON."""
        return self.summary() | {"tensors": [asdict(tensor) for tensor in self.tensors]}


def plan_conversion(
    source: Source,
    *,
    start: str | None = None,
    num_slots: int | None = None,
    slots_by_layer: Iterable[int | list[int]] | None = None,
    num_sinks: int = 4,
    keep_softmax: Iterable[int] = (),
    gate_write: float = T2RConfig.gate_write_logit,
    gate_keep: float = T2RConfig.gate_keep_logit,
    window: int | None = None,
    dtype: str | None = None,
) -> Plan:
    """Plan the conversion of a model.

    Args:
        source: from `read_source` or `open_source`.
        start: "window", "routed" or "paper"; None for "routed", or what a recurrent source is.
        num_slots: slots of each key/value head; None for 64, or what a recurrent source has.
        slots_by_layer: window and routed start: the same for each layer, if layers are to differ, or for each
            key/value head of a layer, if these are.
        num_sinks: window and routed start: slots that keep the first tokens.
        keep_softmax: numbers of the layers that stay softmax attention.
        gate_write: window and routed start: `T2RConfig.gate_write_logit`.
        gate_keep: window and routed start: `T2RConfig.gate_keep_logit`.
        window: window and routed start: tokens of a softmax window beside the slots of each converted layer; None for
            no such window.
        dtype: of all weights: "float32", "float16" or "bfloat16"; None for the source's.

    Raises:
        ValueError: an argument is out of range, or not what a recurrent source is; or tensors are missing, unexpected,
            or of a wrong shape or dtype (all of them are named).
    """
    values = source.family.config_values(source.config)
    keep_softmax = tuple(keep_softmax)
    if source.family.recurrent:
        wanted = {"start": start, "num_slots": num_slots, "keep_softmax": keep_softmax or None, "window": window}
        wanted["slots_by_layer"] = slots_by_layer
        _check_unchanged(source.name, values, **wanted)
    if slots_by_layer is not None:
        slots_by_layer = [list(x) if isinstance(x, tuple) else x for x in slots_by_layer]
        means = [fmean(x) if isinstance(x, list) and x else x for x in slots_by_layer]
        if means and all(isinstance(x, int | float) for x in means):  # what else there is is refused below
            num_slots = num_slots or int(fmean(means))
    options = {"start": "routed", "num_slots": DEFAULT_SLOTS}
    options |= {name: x for name, x in {"start": start, "num_slots": num_slots}.items() if x is not None} | values
    _warn_without_effect(options["start"], num_sinks=num_sinks, gate_write_logit=gate_write, gate_keep_logit=gate_keep)
    options |= {"num_sinks": num_sinks, "gate_write_logit": gate_write, "gate_keep_logit": gate_keep}
    options |= {"hybrid_window": window, "slots_by_layer": slots_by_layer}
    try:
        config = T2RConfig(**options)
    except Exception as error:  # whatever transformers makes of fields that make no sense
        raise ValueError(one_line(error)) from error
    if not source.family.recurrent:
        config.layer_types = _layer_types(config, keep_softmax)
    return plan_for(source, config, dtype)


def plan_for(source: Source, config: T2RConfig, dtype: str | None = None) -> Plan:
    """Plan the conversion of a model whose configuration afterwards is known. Completes the configuration.

    Args:
        source: from `read_source` or `open_source`.
        config: of the converted model.
        dtype: see `plan_conversion`.

    Raises:
        ValueError: the source's tensors do not fit the configuration (all of them are named), or `dtype` is unknown.
    """
    check_tensors(source, config)
    kept = _source_tensors(source, config)
    if dtype is not None:
        spelled = _spelled(dtype)
        kept = [replace(x, dtype=spelled, bytes=x.parameters * DTYPES[spelled].itemsize) for x in kept]
    dtype = _main_dtype(kept)
    config.architectures = ["T2RForCausalLM"]
    config.dtype = DTYPES[dtype]
    new = () if source.family.recurrent else _new_tensors(config, dtype)
    return Plan(source, config, DTYPES[dtype], (*kept, *new))


def _check_unchanged(source: str, values: dict[str, Any], **wanted: Any) -> None:
    other = [name for name, value in wanted.items() if value not in (None, values.get(name))]
    if other:
        raise ValueError(
            f"{source}: has Gated Slot Attention already, of start {values['start']!r} with {values['num_slots']} "
            f"slots; leave out {', '.join(other)}"
        )


def _warn_without_effect(start: str, **settings: float) -> None:
    changed = [name for name, value in settings.items() if value != getattr(T2RConfig, name)]
    if start == "paper" and changed:
        warnings.warn(f"no effect with start 'paper': {', '.join(changed)}", stacklevel=3)


def _layer_types(config: T2RConfig, keep_softmax: Iterable[int]) -> list[str]:
    kept, layers = set(keep_softmax), config.num_hidden_layers
    outside = sorted(kept - set(range(layers)))
    if outside:
        raise ValueError(f"keep_softmax: no layers {', '.join(map(str, outside))}; the model has 0 to {layers - 1}")
    return [config.softmax_type if layer in kept else kind for layer, kind in enumerate(config.layer_types)]


def _all_softmax(config: T2RConfig) -> T2RConfig:
    twin = copy(config)
    twin.layer_types = [config.softmax_type] * config.num_hidden_layers
    return twin


def check_tensors(source: Source, config: T2RConfig) -> None:
    """Raise ValueError if a source's tensors are not those that its family and configuration expect."""
    expected, found = source.family.expected_tensors(config), source.tensors
    shared = [name for name in expected if name in found]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected and not source.family.drops(name)],
        "of the wrong shape": [
            f"{name} {list(found[name].shape)} instead of {list(expected[name])}"
            for name in shared
            if found[name].shape != expected[name]
        ],
        "of a dtype other than " + ", ".join(DTYPES): [
            f"{name} {found[name].dtype}" for name in shared if found[name].dtype not in DTYPES
        ],
    }
    lines = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if lines:
        raise ValueError(
            f"{source.folder}: tensors do not fit its config.json (is it a plain, unquantised "
            f"{source.family.model_type} checkpoint?): {'; '.join(lines)}"
        )


def _source_tensors(source: Source, config: T2RConfig) -> list[PlannedTensor]:
    expected = source.family.expected_tensors(config)
    return [
        _planned(name, "copied" if name in expected else "dropped", header) for name, header in source.tensors.items()
    ]


def _planned(name: str, action: str, header: SourceTensor) -> PlannedTensor:
    return PlannedTensor(name, action, header.shape, header.dtype, header.parameters, header.bytes, header.shard)


def _spelled(dtype: str) -> str:
    names = {str(known).removeprefix("torch."): name for name, known in DTYPES.items()}
    if dtype not in names:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(names)}")
    return names[dtype]


def _main_dtype(tensors: list[PlannedTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.action == "copied":
            sizes[tensor.dtype] += tensor.bytes
    return sizes.most_common(1)[0][0]


def _new_tensors(config: T2RConfig, dtype: str) -> list[PlannedTensor]:
    itemsize = DTYPES[dtype].itemsize
    return [
        PlannedTensor(
            f"model.layers.{layer}.self_attn.{name}", "new", shape, dtype, size, size * itemsize, None, mean, std
        )
        for layer in config.slot_layers
        for name, (shape, mean, std) in new_tensors(config, layer).items()
        for size in [prod(shape)]
    ]
