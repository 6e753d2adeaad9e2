"""What model card and report say of a training: figures of the run, and no path of this machine."""

import platform
import resource
import sys
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from peft import PeftModel

import t2r
from t2r.model import T2RForCausalLM
from t2r.training.adapters import select_trained
from t2r.training.config import TrainConfig
from t2r.training.data import Tokens
from t2r.training.documents import is_local, sources_of
from t2r.training.recipe import as_dict
from t2r.training.stages import Stage
from t2r.training.teachers import describe_teacher


def summarise_training(
    config: TrainConfig,
    model: T2RForCausalLM | PeftModel,
    stages: list[Stage],
    tokens: Tokens,
    history: list[dict],
    dtype: str,
    device: torch.device,
) -> dict:
    """What the model card and the report say of the training. No path of this machine among it."""
    state = PartialState()
    return {
        "steps": sum(stage.steps for stage in stages),
        "tokens": sum(stage.steps * stage.tokens_per_step for stage in stages),
        "tokens_in_data": len(tokens.ids),
        "data": [Path(s.path).name if is_local(s) else s.path for s in sources_of(config.data)],
        "stages": [_stage(stage) for stage in stages],
        "lora": as_dict(config)["lora"] if isinstance(model, PeftModel) else None,
        "teacher": describe_teacher(config),
        "trained_parameters": max(_trained(model, stage) for stage in stages),
        "seed": config.seed,
        "dtype": dtype,
        "seconds": round(sum(_seconds(stage, history) for stage in stages), 1),
        "hardware": _hardware(device, state.num_processes),
        "peak_memory_mib": _peak_memory(device),
        "versions": {"t2r": t2r.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _trained(model: T2RForCausalLM | PeftModel, stage: Stage) -> int:
    select_trained(model, stage.config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _stage(stage: Stage) -> dict:
    content = as_dict(stage.config)
    return {
        "stage": stage.name,
        "steps": stage.steps,
        "tokens": stage.steps * stage.tokens_per_step,
        "sequence_length": stage.config.sequence_length,
        "tokens_per_step": stage.tokens_per_step,
        "objective": {key: value for key, value in content["loss"].items() if value},
        "trains": stage.config.trains,
        "optimizer": content["optim"],
    }


def _seconds(stage: Stage, history: list[dict]) -> float:
    """Time spent training, over all sessions of a resumed run."""
    entries = [entry for entry in history if entry["stage"] == stage.name]
    steps = [b["step"] - a["step"] for a, b in pairwise([{"step": stage.steps_before}, *entries])]
    return sum(n * stage.tokens_per_step / entry["tokens_per_second"] for n, entry in zip(steps, entries, strict=True))


def _hardware(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads() * processes} CPU threads ({platform.machine()})"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
