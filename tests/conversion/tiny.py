"""Tiny source checkpoints, saved by transformers."""

import hashlib
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import t2r_conversion

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

# These checkpoints have no tokenizer, which the routed start needs.
convert = partial(t2r_conversion.convert, start="window")
plan_conversion = partial(t2r_conversion.plan_conversion, start="window")


MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (partial(Phi3Config, pad_token_id=0, eos_token_id=2), Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def random_model(family: str, folder: Path, *, dtype=torch.float32, shard_size="5GB", **changes) -> Path:
    """A random model of a family, in `folder`."""
    config_class, model_class = MODELS[family]
    return _save(model_class, config_class(**SHAPE | changes), folder, dtype, shard_size)


llama, mistral, phi3, qwen2 = (partial(random_model, name) for name in ("llama", "mistral", "phi3", "qwen2"))
qwen3 = partial(random_model, "qwen3", head_dim=16)  # heads that together are wider than the hidden states
UNTOUCHED = [llama, mistral, qwen2, qwen3]  # families whose tensors the converted model holds as they are
FAMILIES = [*UNTOUCHED, phi3]


def _save(model_class, config, folder: Path, dtype, shard_size: str) -> Path:
    torch.manual_seed(0)
    model = model_class(config).to(dtype)
    for parameter in model.parameters():  # biases start at zero, which would hide a mix-up
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("not ours")
    (folder / "optimizer.bin").write_text("training state")
    return folder


def add_tensors(shard: Path, **tensors: torch.Tensor) -> None:
    """Put more tensors into a safetensors file; `__` in a name stands for a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(shard) | more, shard, metadata={"format": "pt"})


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a folder."""
    return {name: value for shard in sorted(folder.glob("*.safetensors")) for name, value in load_file(shard).items()}


def hashes(folder: Path) -> list[str]:
    """Hash of each safetensors file, in order."""
    return [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in sorted(folder.glob("*.safetensors"))]
