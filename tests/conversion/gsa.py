"""Tiny checkpoints of flash-linear-attention, and what it computes from them, in plain PyTorch."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {  # all that release 0.6.0 writes into a config.json
    "architectures": ["GSAForCausalLM"],
    "attn": None,
    "attnres_block_size": None,
    "bos_token_id": 1,
    "clamp_max": None,
    "clamp_min": None,
    "conv_size": 4,
    "dtype": "float32",
    "elementwise_affine": True,
    "eos_token_id": 2,
    "expand_k": 1,
    "expand_v": 1,
    "feature_map": "swish",
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "gate_logit_normalizer": 8,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "model_type": "gsa",
    "norm_eps": 1e-6,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "num_kv_heads": 2,
    "num_slots": 6,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_l2warp": False,
    "use_norm": True,
    "use_output_gate": False,
    "use_short_conv": False,
    "vocab_size": 96,
}
OF_2024 = {"norm_first": True, "gate_low_rank_dim": None, "use_rope": False}


def weights(c: dict, dtype=torch.float32) -> dict[str, Tensor]:
    """Random weights under the names of 0.6.0; norms are fp32, as it makes them."""
    hidden, heads, mlp = c["hidden_size"], c["num_heads"], c["intermediate_size"] or 256
    kv_heads = c["num_kv_heads"] or heads
    narrow, slots = hidden // heads * kv_heads, (c["num_slots"] or hidden // heads) * kv_heads
    shapes = {"model.embeddings": (c["vocab_size"], hidden), "model.norm": (hidden,)}
    for i in range(c["num_hidden_layers"]):
        layer = {"attn_norm": (hidden,), "attn.q_proj": (hidden, hidden), "attn.k_proj": (narrow, hidden)}
        layer |= {"attn.v_proj": (narrow, hidden), "attn.o_proj": (hidden, hidden), "mlp_norm": (hidden,)}
        layer |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
        if i not in softmax_layers(c):
            layer |= {"attn.f_proj": (slots, hidden), "attn.g_norm": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not c["tie_word_embeddings"]:
        shapes["lm_head"] = (c["vocab_size"], hidden)
    g = torch.Generator().manual_seed(0)
    random = {f"{name}.weight": torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * x if x.dim() == 1 else (0.3 * x).to(dtype) for name, x in random.items()}


def softmax_layers(c: dict) -> dict[int, dict]:
    """What `attn` says of each layer that it names."""
    specs = c["attn"] if isinstance(c["attn"], list) else [c["attn"] or {"layers": []}]
    return {layer: spec for spec in specs for layer in spec["layers"]}


def as_in_2024(w: dict[str, Tensor], norm_first: bool = True) -> dict[str, Tensor]:
    """The same weights as the first checkpoints hold them."""
    old = {}
    for name, x in w.items():
        if norm_first:
            name = name.replace(".attn_norm.", ".attn.norm.").replace(".mlp_norm.", ".mlp.norm.")
        if "gate_proj" in name:
            x = torch.cat([x, w[name.replace("gate_proj", "up_proj")]])
        if "up_proj" not in name:
            old[name] = x
    return old


def write(folder: Path, c: dict, w: dict[str, Tensor], shards: int = 1) -> Path:
    """A model folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(c))
    (folder / "tokenizer.json").write_text("{}")
    names, weight_map = sorted(w), {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: w[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def logits(c: dict, w: dict[str, Tensor], ids: Tensor, output_eps: float = 1e-5) -> Tensor:
    """What a GSAForCausalLM of these weights makes of tokens `[B, T]`, in fp64."""
    w = {name: x.double() for name, x in w.items()}

    def norm(x, name, eps=c["norm_eps"]):
        return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], eps)

    x = w["model.embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}."
        h = norm(x, f"{name}attn_norm")
        q, k, v = (
            (h @ w[f"{name}attn.{part}_proj.weight"].mT).unflatten(-1, (-1, c["hidden_size"] // c["num_heads"]))
            for part in "qkv"
        )
        if spec := softmax_layers(c).get(i):
            o = attention(q, k, v, spec["window_size"], spec["rope_theta"])
        else:
            f = (h @ w[f"{name}attn.f_proj.weight"].mT).unflatten(-1, (k.shape[2], -1))
            alpha = torch.sigmoid(f) ** (1 / c["gate_logit_normalizer"])
            o = norm(F.silu(slots(F.silu(q), F.silu(k), F.silu(v), alpha)), f"{name}attn.g_norm", output_eps)
        x = x + o @ w[f"{name}attn.o_proj.weight"].mT
        h = norm(x, f"{name}mlp_norm")
        gate, up = (h @ w[f"{name}mlp.{part}_proj.weight"].mT for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{name}mlp.down_proj.weight"].mT
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embeddings.weight"]).mT


def slots(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """Equations 7 to 9 of arXiv 2409.07146, token by token: q `[B, T, HQ, D]` to `[B, T, HQ * D]`."""
    groups = q.shape[2] // k.shape[2]
    k, v, alpha = (x.repeat_interleave(groups, 2) for x in (k, v, alpha))
    keys = values = q.new_zeros(*q.shape[:1], *q.shape[2:3], alpha.shape[-1], q.shape[-1])  # [B, HQ, M, D]
    out = []
    for t in range(q.shape[1]):
        keep = alpha[:, t].unsqueeze(-1)
        keys = keep * keys + (1 - keep) * k[:, t].unsqueeze(-2)
        values = keep * values + (1 - keep) * v[:, t].unsqueeze(-2)
        p = (keys @ q[:, t].unsqueeze(-1)).softmax(-2)
        out.append((p * values).sum(-2))
    return torch.stack(out, 1).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, theta: float) -> Tensor:
    """Softmax attention of rotated queries and keys to the last `window` tokens."""
    T, D = q.shape[1], q.shape[-1]
    angle = torch.arange(T)[:, None, None] * theta ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = angle.cos(), angle.sin()
    halves = (x.chunk(2, -1) for x in (q, k))
    q, k = (torch.cat((x * cos - y * sin, y * cos + x * sin), -1) for x, y in halves)
    ago = torch.arange(T)[:, None] - torch.arange(T)
    mask = (ago >= 0) & (ago < (window or T))
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    return o.transpose(1, 2).flatten(2)
