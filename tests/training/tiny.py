"""A tiny converted model with a tokenizer, and configurations to finetune it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from t2r.model import T2RForCausalLM
from t2r.training.adapters import add_adapters, select_trained
from t2r.training.config import LoraConfig, StageConfig, TrainConfig
from t2r.training.recipe import load_config
from tests.model.tiny import student, teacher

TEXT = "the cat sat on a mat and saw some dogs run far away from home while it rained all day long"
WORDS = TEXT.split()


def documents(count=40):
    """Sentences with a rhythm to learn, of very different lengths."""
    return [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 3 + (7 * i) % 50)) for i in range(1, count + 1)]


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def workspace(folder: Path, **overrides) -> Path:
    """A converted model, training and held-out text, and a configuration; returns the configuration's path."""
    model = student(teacher(), **overrides)
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "model" / "t2r_record.json").write_text(json.dumps({"conversion": {"source": "tiny"}}))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents())
    (folder / "train.jsonl").write_text(rows)
    (folder / "heldout.txt").write_text("\n".join(documents(12)))
    config = {
        "model": str(folder / "model"),
        "output": str(folder / "run"),
        "data": {"files": [str(folder / "train.jsonl")], "sequence_length": 32},
        "lora": {"r": 4},
        "optim": {"lr": 1e-2, "gate_lr": 1e-2},
        "steps": 6,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def learnt(model: T2RForCausalLM) -> PeftModel:
    """With adapters that have learnt something."""
    model = add_adapters(model, LoraConfig(r=2))
    select_trained(model, StageConfig())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def run_on_two_processes(
    config: Path,
    *overrides: str,
    resume: bool = False,
    sharded: bool = False,
    dies_after: int | None = None,
    only_rank: int | None = None,
) -> dict | str:
    """The record of a run by two processes that talk through gloo, over which weights may be sharded (FSDP2).

    Or what it wrote to stderr, if its processes (or one of them) die after so many forward passes each.
    """
    # On a machine without GPUs, `--multi_gpu` starts processes on its CPUs.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    module = "tests.training.on_cpus" if sharded or dies_after is not None else "t2r.train"
    env = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= fsdp_environment() if sharded else {}
    env |= {} if dies_after is None else {"DIES_AFTER": str(dies_after)}
    env |= {} if only_rank is None else {"DIES_ALONE": str(only_rank)}
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", module, str(config), *overrides, *(["--resume"] if resume else [])],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    if dies_after is not None:
        assert done.returncode != 0
        return done.stderr
    assert done.returncode == 0, done.stderr
    return json.loads((Path(tiny_config(config.parent, *overrides).output) / "t2r_record.json").read_text())


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` sets for examples/accelerate/fsdp2.yaml."""
    path = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
    settings = yaml.safe_load(path.read_text())["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value) for key, value in settings.items()}


def tiny_config(folder: Path, *overrides: str) -> TrainConfig:
    return load_config(folder / "config.yaml", list(overrides))
