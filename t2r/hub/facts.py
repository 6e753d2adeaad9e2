"""What a model folder says about itself, from its JSON files and safetensors headers alone."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from t2r.model import T2RConfig
from t2r_conversion.headers import SourceTensor, read_headers
from t2r_conversion.record import read_record

CONTEXTS = (2048, 32768)


@dataclass(frozen=True)
class ModelFacts:
    """A model folder in figures.

    Attributes:
        folder: where it is.
        model_type: "t2r", or another of transformers'.
        start: how the recurrent layers were started; None if there are none.
        layers: number of layers by type.
        shape: hidden size, heads, key/value heads, head width, vocabulary.
        slots: slots of each key/value head, or what was asked for where heads differ; None without recurrent layers.
        slots_in_words: the same for people.
        sinks: slots that keep the first tokens; None where the start has none.
        window: tokens of the softmax window beside the slots; None where there is none.
        parameters: numbers stored.
        weight_bytes: bytes of those.
        dtype: dtype of most parameters, as safetensors spells it.
        shards: safetensors files.
        state_bytes: recurrent state of one sequence, whatever its length.
        memory_bytes: by context length, state and key/value cache of one sequence.
        softmax_bytes: by context length, the key/value cache if every layer were softmax attention.
        record: `t2r_record.json`, empty when there is none.
    """

    folder: str
    model_type: str
    start: str | None
    layers: dict[str, int]
    shape: dict[str, int]
    slots: int | None
    slots_in_words: str | None
    sinks: int | None
    window: int | None
    parameters: int
    weight_bytes: int
    dtype: str
    shards: int
    state_bytes: int
    memory_bytes: dict[int, int]
    softmax_bytes: dict[int, int]
    record: dict

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def model_facts(folder: str | Path) -> ModelFacts:
    """Read a model folder's configuration, record and safetensors headers. No tensor is read.

    Raises:
        ValueError: this is no model folder, or a file in it is damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = list(read_headers(folder).values())
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.parameters
    dtype = sizes.most_common(1)[0][0]
    itemsize = SourceTensor((1,), dtype, "").bytes
    recurrent = isinstance(config, T2RConfig) and bool(config.slot_layers)
    state = config.state_bytes(itemsize) if recurrent else 0
    return ModelFacts(
        folder=str(folder),
        model_type=config.model_type,
        start=config.start if recurrent else None,
        layers=dict(Counter(_layer_types(config))),
        shape=_shape(config),
        slots=config.num_slots if recurrent else None,
        slots_in_words=config.slots_in_words if recurrent else None,
        sinks=config.num_sinks if recurrent and config.start != "paper" else None,
        window=config.hybrid_window if recurrent else None,
        parameters=sizes.total(),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        dtype=dtype,
        shards=len({tensor.shard for tensor in tensors}),
        state_bytes=state,
        memory_bytes={n: state + _kv_elements(config, n) * itemsize for n in CONTEXTS},
        softmax_bytes={n: _softmax_elements(config, n) * itemsize for n in CONTEXTS},
        record=read_record(folder),
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """A folder's configuration.

    Raises:
        ValueError: no folder, no `config.json`, or not a configuration of a language model.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: is a finetune run, not a model; merge it first: t2r merge {folder} -o OUT")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"{folder / 'config.json'}: model type {config.model_type!r} is not a language model")
    return config


def _shape(config: PreTrainedConfig) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": _kv_heads(config),
        "head_dim": _head_dim(config),
        "vocabulary": config.vocab_size,
    }


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def _kv_heads(config: PreTrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_elements(config: PreTrainedConfig, num_tokens: int) -> int:
    if isinstance(config, T2RConfig):
        return config.kv_cache_elements(num_tokens)
    return _softmax_elements(config, num_tokens)


def _softmax_elements(config: PreTrainedConfig, num_tokens: int) -> int:
    held = min(num_tokens, getattr(config, "sliding_window", None) or num_tokens)
    return config.num_hidden_layers * _kv_heads(config) * held * 2 * _head_dim(config)
