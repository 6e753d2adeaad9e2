"""GGUF in: headers through the `gguf` package, weights through transformers, into a plain Hugging Face folder."""

import json
from pathlib import Path

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion.families import FAMILIES, Family, family_of

MAX_SHARD_SIZE = "1GB"


def read_gguf_header(path: Path) -> tuple[Family, PreTrainedConfig, dict[str, tuple[int, ...]], str | None]:
    """Family, configuration, the tensors' shapes under their Hugging Face names, and the licence if it is named.

    A tensor that the family does not know stays under its GGUF name, so that the planner reports it.

    Raises:
        ValueError: the file is damaged, or of an unsupported family.
    """
    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        licence = reader.fields["general.license"].contents() if "general.license" in reader.fields else None
        shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error}); download it again") from error
    families = [family for family in FAMILIES.values() if family.gguf_architecture]
    if architecture not in {family.gguf_architecture for family in families}:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported; supported families: "
            f"{', '.join(family.model_type for family in families)}"
        )
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    family = family_of(config.model_type, None, str(path))
    names = _huggingface_names(family, config)
    return family, config, {names.get(name, name): shape for name, shape in shapes.items()}, licence


def unpack_gguf(path: Path, config: PreTrainedConfig, folder: Path) -> None:
    """Write a GGUF file's model as a plain fp32 Hugging Face folder: weights, configuration, tokenizer.

    Raises:
        ValueError: transformers did not find all weights in the file.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)
    model, loading = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{path}: no weights for {', '.join(missing)}; download it again")
    model.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    _save_weights(weights, folder)  # model.save_pretrained refuses: the model counts as quantized


def _huggingface_names(family: Family, config: PreTrainedConfig) -> dict[str, str]:
    """The Hugging Face name of each GGUF tensor that the family expects."""
    architecture = {name: key for key, name in MODEL_ARCH_NAMES.items()}[family.gguf_architecture]
    table = get_tensor_name_map(architecture, config.num_hidden_layers)
    expected = family.expected_tensors(T2RConfig(**family.config_values(config)))
    stored = {family.stored_name(name) for name in expected}
    return {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in stored}


def _save_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    for shard, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / shard, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
