"""Tokens a second of LoRA training, beside the softmax model's: random weights of Mistral-7B's shape, bf16, rank 16.

`python -m benchmarks.training --work DIR` makes the checkpoint, measures each kind of training in a process of its own
and writes `training.json`. `--layers 4` tries it out on a model of four layers; `--only finetune/2048` measures that.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from benchmarks.mistral_7b import make_source
from benchmarks.record import write_results

RESULTS = Path(__file__).parent / "results"
STEP_TOKENS = 16384
# Each row: what trains how, and the length of sequences.
ROWS = {
    "finetune/2048": ("finetune", 2048),
    "finetune/16384": ("finetune", 16384),
    "distill/2048": ("distill", 2048),
    "align/2048": ("align", 2048),
}


class Clock(TrainerCallback):
    """Seconds of the steps after the first ones, which warm up."""

    def __init__(self, warm_up: int):
        self.warm_up, self.began, self.seconds = warm_up, None, None

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Start or stop."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        if state.global_step == self.warm_up:
            self.began = time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.began


class Rows(Dataset):
    """Packed rows, a document each, as transformers' own models take them."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`."""
        ids = self.rows[i]["input_ids"]
        return {"input_ids": ids, "labels": ids}


def trainer_of(who: str, kind: str, length: int, work: Path, steps: int) -> Trainer:
    """A trainer of ours, or of the softmax model with the same settings."""
    import peft

    from t2r.evaluation import load_model
    from t2r.training.adapters import add_adapters
    from t2r.training.config import DataConfig, TrainConfig
    from t2r.training.data import PackedRows, Tokens
    from t2r.training.stages import plan_stages
    from t2r.training.teachers import OwnTeacher
    from t2r.training.trainer import T2RTrainer, training_arguments

    config = TrainConfig(
        model=str(work / "converted"), output=str(work / "run"), gradient_checkpointing=True, save_every=10**6,
        batch_size=max(1, STEP_TOKENS // length), data=DataConfig(files=["none.txt"], sequence_length=length),
        stages=[{"stage": kind, "steps": steps}],
    )  # fmt: skip
    (stage,) = plan_stages(config, 1)
    on_cuda = torch.cuda.is_available()
    args = training_arguments(config, stage, bf16=on_cuda)
    args.save_strategy = "no"
    total = (steps + 1) * STEP_TOKENS * args.world_size
    ids = np.random.default_rng(0).integers(2, 32000, total).astype(np.int32)
    rows = PackedRows(Tokens(ids, np.arange(0, total + 1, length)), length)
    dtype = "bfloat16" if on_cuda else "float32"
    if who == "ours":
        model = add_adapters(load_model(work / "converted", dtype=dtype), config.lora)
        return T2RTrainer(model, OwnTeacher(), stage, rows, args)
    model = AutoModelForCausalLM.from_pretrained(work / "source", dtype=dtype, device_map=args.device)
    lora = config.lora
    options = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": list(lora.targets), "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    return Trainer(model=model, args=args, train_dataset=Rows(rows))


def measure(who: str, kind: str, length: int, work: Path, steps: int) -> dict:
    """Tokens a second over all processes, and peak memory of this one in GiB."""
    trainer, clock = trainer_of(who, kind, length, work, steps), Clock(warm_up=3)
    trainer.add_callback(clock)
    trainer.train()
    tokens = (steps - clock.warm_up) * STEP_TOKENS * trainer.args.world_size
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"tokens_per_second": tokens / clock.seconds, "peak_gib": peak, "main": trainer.is_world_process_zero()}


def in_a_process(*words: str) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--one", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(work: Path, layers: int) -> None:
    """The source and its converted form, unless they are there."""
    import t2r_conversion

    if not (work / "converted" / "config.json").is_file():
        (work / "source").mkdir(parents=True, exist_ok=True)
        make_source(work / "source", num_hidden_layers=layers)
        t2r_conversion.convert(work / "source", work / "converted", overwrite=True)


def main() -> None:
    """Measure all rows, or (`--one`) one of them here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--one", nargs=3, metavar=("WHO", "KIND", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, kind, length = options.one
        found = measure(who, kind, int(length), options.work, options.steps)
        if found.pop("main"):
            print(json.dumps(found))
        return
    prepare(options.work, options.layers)
    settings = ("--work", str(options.work), "--steps", str(options.steps))
    wanted, rows, softmax = options.only or list(ROWS), [], {}
    for name in (name for name in ROWS if name in wanted):
        kind, length = ROWS[name]
        ours = in_a_process("ours", kind, str(length), *settings)
        softmax[length] = softmax.get(length) or in_a_process("softmax", "finetune", str(length), *settings)
        row = {"name": name, "unit": "tokens/s", "ours": round(ours["tokens_per_second"], 1)}
        rows.append(row | {"softmax": round(softmax[length]["tokens_per_second"], 1)})
        if name == "distill/2048":
            rows.append({"name": "distill_peak_gib", "unit": "GiB", "ours": round(ours["peak_gib"], 2)})
    table = Table("row", "unit", "ours", "softmax", "ratio")
    for row in rows:
        peer = row.get("softmax")
        ratio = f"{row['ours'] / peer:.2f}" if peer else "–"
        table.add_row(row["name"], row["unit"], f"{row['ours']:,}", f"{peer:,}" if peer else "–", ratio)
    Console().print(table)
    Console(stderr=True).print(str(write_results("training", rows, options.out)))


if __name__ == "__main__":
    main()
