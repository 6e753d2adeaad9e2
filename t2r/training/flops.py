"""Work: floating-point operations a token, and what a GPU could do."""

import torch

from t2r.model import T2RConfig
from t2r.training.config import StageConfig

# bf16 on tensor cores, dense, operations a second, by what a GPU's name contains (NVIDIA's data sheets).
PEAK = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of a GPU at its best; None for what the table does not hold."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)


def flops_per_token(network: T2RConfig, stage: StageConfig) -> int:
    """Operations that a stage's training takes for one token, recomputation and attention's own work not counted.

    Twice a weight matrix's numbers for each pass through it: forward, backward to the input and, where it trains
    itself, backward to the weight; the teacher's forward; to align, backward through attention alone.
    """
    attention, mlp, head = matrix_parameters(network)
    if stage.loss.align:
        return 2 * (attention + mlp) + 2 * attention * (3 if stage.trains == "full" else 2)
    passes = 2 + (stage.trains == "full") + bool(stage.loss.distill)
    return 2 * passes * (attention + mlp + head)


def matrix_parameters(network: T2RConfig) -> tuple[int, int, int]:
    """Numbers in the weight matrices that each token is multiplied with: of attention layers, of MLPs, of the head."""
    hidden, D = network.hidden_size, network.head_dim
    attention = 2 * hidden * (network.num_attention_heads + network.num_key_value_heads) * D
    gates = hidden * sum(network.slots_of_heads)
    layers = network.num_hidden_layers
    mlp = layers * 3 * hidden * network.intermediate_size
    return layers * attention + gates, mlp, hidden * network.vocab_size
