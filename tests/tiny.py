"""Tiny models and a tokenizer in folders, as a user would have them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2r.model import T2RConfig, T2RForCausalLM

WORDS = ["<unk>", "<s>", "</s>", "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]
WORDS += ["and", "then", "it", "was", "not", "so", "red", "big", "old"]
SHAPE = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large enough for the models to be sure of something
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} and {% endfor %}"
REPORT = {
    "windows": 2,
    "tokens": 126,
    "student": 31.25,
    "teacher": 25.0,
    "ratio": 1.25,
    "bands": [{"from": 0, "to": 63, "student": 31.25, "teacher": 25.0, "ratio": 1.25}],
}


def tiny_tokenizer(path: Path, *, chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, saved to `path`."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    fast.save_pretrained(path)
    return fast


def tiny_llama(path: Path, *, seed: int = 0, chat: bool = False, **overrides) -> LlamaForCausalLM:
    """A random Llama with its tokenizer, saved to `path`."""
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(LlamaConfig(**SHAPE | overrides)), path, chat)


def tiny_t2r(path: Path, *, seed: int = 0, chat: bool = False, **overrides) -> T2RForCausalLM:
    """A random T2R model of 8 slots with its tokenizer, saved to `path`."""
    torch.manual_seed(seed)
    config = T2RConfig(**SHAPE | {"num_slots": 8, "num_sinks": 2} | overrides)
    return _save(T2RForCausalLM(config), path, chat)


def tiny_text(count: int, seed: int = 0) -> str:
    """A text of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(3, len(WORDS), (count,), generator=generator).tolist()
    return " ".join(WORDS[number] for number in numbers)


def write_record(path: Path, **sections: dict) -> None:
    """A `t2r_record.json` in a model folder."""
    (path / "t2r_record.json").write_text(json.dumps(sections))


def _save(model, path: Path, chat: bool):
    model.eval().save_pretrained(path)
    tiny_tokenizer(path, chat=chat)
    return model
