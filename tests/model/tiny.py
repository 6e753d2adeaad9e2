"""A tiny teacher with random weights, and students made from it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from t2r.model import T2RConfig, T2RForCausalLM

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # large enough for attention to matter
    "pad_token_id": 0,
}


def teacher(seed=0, **overrides):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | overrides)).eval()


def sliding_teacher(window, seed=0):
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)).eval()


def student(source=None, *, exact=False, seed=0, **overrides):
    """A T2R model with the teacher's weights; `exact` gates write and keep fully."""
    torch.manual_seed(seed)
    gates = {"gate_write_logit": 30.0, "gate_keep_logit": 30.0} if exact else {}
    model = T2RForCausalLM(T2RConfig(**SHAPE | {"num_slots": 16, "num_sinks": 2} | gates | overrides)).eval()
    missing = model.load_state_dict((source or teacher()).state_dict(), strict=False).missing_keys
    assert all(name.split(".")[-2] in ("f_proj", "g_norm", "router") for name in missing)
    return route(model) if model.config.start == "routed" else model


def route(model):
    """Routers to which tokens differ."""
    generator = torch.Generator().manual_seed(4)
    for name, buffer in model.named_buffers():
        if "router" in name:
            buffer.normal_(std=0.3, generator=generator)
    return model


def shake(model, scale=0.5):
    """Move the gates away from their start, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "f_proj" in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def tokens(batch, length, seed=0):
    return torch.randint(1, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
