"""Block sizes and warps for a device and shape: `configs.json`, which `python -m benchmarks.tune_operator` rewrites."""

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("configs.json")
MOST_SLOTS = 128  # that the table goes up to


@dataclass(frozen=True, eq=False)
class Config:
    """How the kernels are cut up and launched. Each is like itself alone, so that it can be part of a key.

    Attributes:
        chunk: tokens a chunk.
        block_d: columns of keys and values that are handled at once.
        states: launch options of `chunk_states_kernel`: BS slots at a time, num_warps, num_stages.
        scan: of `scan_kernel`: BLOCK elements a program.
        output: of `output_kernel`: HEADS query heads at a time.
        queries: of `query_gradients_kernel`.
        tokens: of `token_gradients_kernel`.
        through: of `state_gradients_kernel`.
        gates: of `gate_gradients_kernel`.
        step: of `step_kernel`.
    """

    chunk: int
    block_d: int
    states: dict[str, int]
    scan: dict[str, int]
    output: dict[str, int]
    queries: dict[str, int]
    tokens: dict[str, int]
    through: dict[str, int]
    gates: dict[str, int]
    step: dict[str, int]


def config_for(device: torch.device, width: int, num_slots: int, half: bool) -> Config:
    """The table's entry for a device.

    Args:
        device: where the kernels run. On the CPU (Triton's interpreter) entries are those of the smallest GPUs.
        width: the larger of key and value width.
        num_slots: slots per head, up to `MOST_SLOTS`.
        half: whether keys and values meet the tensor cores as bf16 (fp32 otherwise).
    """
    return lookup(architecture_of(device), width, num_slots, half)


def architecture_of(device: torch.device) -> str:
    """ "sm80", "sm90" and so on: the compute capability's first number; "any" for what is no GPU."""
    return f"sm{torch.cuda.get_device_capability(device)[0] * 10}" if device.type == "cuda" else "any"


@cache
def lookup(architecture: str, width: int, num_slots: int, half: bool) -> Config:
    """The entry for the smallest width and number of slots that cover the given ones.

    An architecture without entries of its own takes those of "any", which fit into 99 KiB of shared memory.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    entries = [e for e in table.get(architecture, table["any"]) if e["half"] == half]
    fitting = [e for e in entries if e["width"] >= width and e["num_slots"] >= num_slots]
    entry = min(fitting, key=lambda e: (e["width"], e["num_slots"]))
    return Config(**{field.name: entry[field.name] for field in fields(Config)})
