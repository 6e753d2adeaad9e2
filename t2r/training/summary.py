"""What model card and report say of a training: figures of the run, and no path of this machine."""

import platform
import resource
import sys
from itertools import pairwise
from pathlib import Path

import torch
import transformers

import t2r
from t2r.training.config import TrainConfig, as_dict
from t2r.training.data import PackedRows
from t2r.training.trainer import T2RTrainer


def summarise_training(
    config: TrainConfig, trainer: T2RTrainer, rows: PackedRows, history: list[dict], dtype: str
) -> dict:
    """What the model card and the report say of the training. No path of this machine among it."""
    device = trainer.args.device
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    steps = trainer.state.global_step
    return {
        "steps": steps,
        "tokens": steps * trainer.tokens_per_step,
        "tokens_in_data": len(rows.tokens.ids),
        "data": [Path(file).name for file in config.data.files],
        "sequence_length": config.data.sequence_length,
        "tokens_per_step": trainer.tokens_per_step,
        "objective": {key: value for key, value in as_dict(config)["loss"].items() if value},
        "lora": as_dict(config)["lora"],
        "optimizer": as_dict(config)["optim"],
        "trained_parameters": trained,
        "seed": config.seed,
        "dtype": dtype,
        "seconds": round(_seconds(history, trainer.tokens_per_step), 1),
        "hardware": _hardware(device, trainer.accelerator.num_processes),
        "peak_memory_mib": _peak_memory(device),
        "versions": {"t2r": t2r.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _seconds(history: list[dict], tokens_per_step: int) -> float:
    """Time spent training, over all sessions of a resumed run."""
    steps = [b["step"] - a["step"] for a, b in pairwise([{"step": 0}, *history])]
    return sum(n * tokens_per_step / entry["tokens_per_second"] for n, entry in zip(steps, history, strict=True))


def _hardware(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads() * processes} CPU threads ({platform.machine()})"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
