"""Tokens a second of LoRA training, beside the softmax model's: random weights of Mistral-7B's shape, bf16, rank 16.

`python -m benchmarks.training --work DIR` makes the checkpoint, measures each kind of training in a process of its own
and writes `training.json`. `--layers 4` tries it out on a model of four layers; `--only finetune/2048` measures that.
Beside t2r (`ours`) and the softmax model stand t2r without liger-kernel and the softmax model with it, if it is there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
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
SHARDED = Path(__file__).parent.parent / "examples" / "accelerate" / "fsdp2.yaml"
# Each row: what trains how, and the length of sequences.
ROWS = {
    "finetune/2048": ("finetune", 2048),
    "finetune/16384": ("finetune", 16384),
    "distill/2048": ("distill", 2048),
    "align/2048": ("align", 2048),
}


PEERS = ("ours_plain", "softmax", "softmax_liger")


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
    from t2r.training.fused import use_liger, wants_liger
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
    args.save_strategy, args.disable_tqdm = "no", True
    total = (steps + 1) * STEP_TOKENS * args.world_size
    ids = np.random.default_rng(0).integers(2, 32000, total).astype(np.int32)
    rows = PackedRows(Tokens(ids, np.arange(0, total + 1, length)), length)
    dtype = "bfloat16" if on_cuda else "float32"
    if who.startswith("ours"):
        model = add_adapters(load_model(work / "converted", dtype=dtype, device=str(args.device)), config.lora)
        if wants_liger(config, on_cuda) and who != "ours_plain":
            use_liger(model)
        return T2RTrainer(model, OwnTeacher(), stage, rows, args)
    args.use_liger_kernel = who == "softmax_liger"
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
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    found = {"tokens_per_second": round(tokens / clock.seconds, 1), "peak_gib": round(peak, 2)}
    return found | {"main": trainer.is_world_process_zero()}


def in_a_process(*words: str, gpus: int = 1) -> dict:
    """`measure` in a process of its own, or in one for each of several GPUs, over which the weights are sharded."""
    launch, seen = [], os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    visible = ",".join(seen.split(",")[:gpus])
    if gpus > 1:
        launch = ["accelerate.commands.launch", "--config_file", SHARDED, "--num_processes", gpus, "-m"]
    command = [sys.executable, "-m", *map(str, launch), "benchmarks.training", "--one", *words]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tokens')))


def prepare(work: Path, layers: int) -> None:
    """The source and its converted form, unless they are there."""
    import t2r_conversion

    if not (work / "converted" / "config.json").is_file():
        (work / "source").mkdir(parents=True, exist_ok=True)
        make_source(work / "source", num_hidden_layers=layers)
        t2r_conversion.convert(work / "source", work / "converted", start="window", overwrite=True)


def main() -> None:
    """Measure all rows, or (`--one`) one of them here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", action="append", choices=[*ROWS, "two_gpus"])
    parser.add_argument("--who", action="append", choices=list(PEERS), help="columns beside `ours` (all)")
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
    wanted, rows = options.only or [*ROWS, *(["two_gpus"] if torch.cuda.device_count() > 1 else [])], []
    peers = [peer for peer in options.who or PEERS if "liger" not in peer or find_spec("liger_kernel")]

    @cache
    def speed(who: str, kind: str, length: int, gpus: int = 1) -> dict:
        found = in_a_process(who, kind, str(length), *settings, gpus=gpus)
        print(who, kind, length, gpus, found, file=sys.stderr, flush=True)
        return found

    for name in (name for name in ROWS if name in wanted):
        kind, length = ROWS[name]
        found = {who: speed(who, kind if "ours" in who else "finetune", length) for who in ("ours", *peers)}
        rows.append({"name": name, "unit": "tokens/s"} | {who: x["tokens_per_second"] for who, x in found.items()})
        if length == 2048:
            peaks = {who: x["peak_gib"] for who, x in found.items() if "ours" in who or kind == "finetune"}
            rows.append({"name": f"{kind}_peak_gib", "unit": "GiB"} | peaks)
    if "two_gpus" in wanted:
        two, one = (speed("ours", "finetune", 2048, gpus) for gpus in (2, 1))
        for name, unit, key in (
            ("two_gpus", "tokens/s", "tokens_per_second"),
            ("two_gpus_peak_gib", "GiB", "peak_gib"),
        ):
            rows.append({"name": name, "unit": unit, "ours": two[key], "one": one[key]})
    columns = ("ours", *PEERS, "one")
    table = Table("row", "unit", *columns)
    for row in rows:
        table.add_row(row["name"], row["unit"], *(f"{row[key]:,}" if key in row else "" for key in columns))
    Console().print(table)
    Console(stderr=True).print(str(write_results("training", rows, options.out)))


if __name__ == "__main__":
    main()
