"""A finetune from beginning to end: prepare, evaluate, train, evaluate again, report."""

import platform
import resource
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import TrainerState
from transformers.trainer_utils import set_seed

import t2r
from t2r.evaluation import load_model, load_tokenizer, read_text
from t2r.model import T2RForCausalLM
from t2r.training.adapters import add_adapters
from t2r.training.config import TrainConfig, as_dict, load_config, save_config
from t2r.training.data import PackedRows, tokenise
from t2r.training.evaluator import Evaluator
from t2r.training.merge import CONFIG
from t2r.training.report import write_report
from t2r.training.trainer import T2RTrainer, training_arguments
from t2r_conversion.record import read_record, write_record

# The Trainer writes the state last.
CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def run(path: str | Path, overrides: list[str] | None = None, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Finetune a converted model as a configuration says.

    The run's folder then holds the adapters with the added parameters, the resolved configuration, the record,
    `report.md` and `report.png`.

    Args:
        path: a YAML file; see `TrainConfig`.
        overrides: `key=value`, stronger than the file.
        resume: go on from the last checkpoint, if there is one.
        overwrite: delete an earlier run in the same folder first.

    Returns:
        The run's record.

    Raises:
        ValueError: the configuration, the model, a text or the output folder is not what it should be, or the loss
            is no number.
    """
    config = load_config(path, overrides)
    if resume and overwrite:
        raise ValueError("give either resume, which goes on with an earlier run, or overwrite, which deletes it")
    if Path(config.model).is_dir():
        config.model = str(Path(config.model).resolve())  # a merge may be called from another folder
    output, state = Path(config.output), PartialState()
    if resume and is_finished(output):
        Console(stderr=True).print(f"{output}: finished already; report: {output / 'report.md'}", highlight=False)
        return read_record(output)
    if config.eval.text:
        read_text(config.eval.text)  # better to fail now than after the model is loaded
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{config.model}: its tokenizer has no end-of-sequence token, which must end each document")
    _check_folder(config, resume, overwrite)
    on_cuda = state.device.type == "cuda"
    dtype = ("bfloat16" if on_cuda else "float32") if config.dtype == "auto" else config.dtype
    args = training_arguments(config, bf16=on_cuda and dtype == "bfloat16")
    with state.main_process_first():
        rows = PackedRows(tokenise(config.data.files, config.data.column, tokenizer), config.data.sequence_length)
    set_seed(config.seed)
    model = load_model(config.model, dtype=dtype, device=str(state.device))
    if not isinstance(model, T2RForCausalLM):
        raise ValueError(
            f"{config.model}: a {model.config.model_type} model; "
            f"convert it first (t2r convert {config.model} -o OUT) and set model: OUT"
        )
    trainer = T2RTrainer(add_adapters(model, config.lora), config, rows, args)

    evaluator = Evaluator(config.eval, tokenizer, trainer.model, state) if config.eval.text else None
    state.wait_for_everyone()  # before the folder that everyone has checked changes
    if state.is_main_process:
        _begin_folder(config, overwrite)
    state.wait_for_everyone()
    record = (read_record(output) if resume else {}) or _inherited(read_record(config.model))
    if evaluator and "evaluation" not in record:
        record["evaluation"] = evaluator.before()
        if state.is_main_process:
            write_record(output, record)

    checkpoint = _last_checkpoint(output) if resume else None
    if resume and state.is_main_process:
        Console(stderr=True).print(
            f"going on from {checkpoint or 'the start: there is no checkpoint'}", highlight=False
        )
    _train(trainer, checkpoint)
    trainer.model.save_pretrained(output, is_main_process=state.is_main_process)
    (output / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card
    record["history"] = [
        {key: entry[key] for key in ("step", "loss", "tokens_per_second", "learning_rate", "grad_norm") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    record["training"] = _summary(config, trainer, rows, record["history"], dtype)
    if evaluator:
        if state.is_main_process:
            write_record(output, record)  # a kill from here on costs the last table alone
        record["evaluation"] |= evaluator.after()
    if state.is_main_process:
        write_record(output, record)
        Console(stderr=True).print(f"report: {write_report(output)}", highlight=False)
    state.wait_for_everyone()
    return record


def _train(trainer: T2RTrainer, checkpoint: Path | None) -> None:
    if checkpoint is None or _step(checkpoint) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    # All steps are taken, and the Trainer would take one more.
    trainer.model.load_adapter(str(checkpoint), trainer.model.active_adapter, is_trainable=True)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def is_finished(run: Path) -> bool:
    """Whether a folder holds a finetune that has come to its end."""
    record = read_record(run)
    evaluated = "after" in record.get("evaluation", {"after": None})
    return (run / "adapter_config.json").is_file() and "training" in record and evaluated


def _inherited(base: dict) -> dict:
    """What a run's record takes over from its model's: the conversion, and what was made of it before."""
    earlier = {key: base[key] for key in ("training", "evaluation", "earlier") if key in base}
    return {key: base[key] for key in ("conversion",) if key in base} | ({"earlier": earlier} if earlier else {})


def _last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole; one that a kill has torn is passed over."""
    for path in sorted(output.glob("checkpoint-*"), key=_step, reverse=True):
        missing = [name for name in CHECKPOINT_FILES if not (path / name).is_file()]
        if not missing:
            return path
        warnings.warn(f"{path} lacks {', '.join(missing)}; it is passed over", stacklevel=2)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _check_folder(config: TrainConfig, resume: bool, overwrite: bool) -> None:
    output = Path(config.output)
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / CONFIG).is_file():
        raise ValueError(f"{output}: not empty and no t2r train run; choose another output")
    started = any(output.glob("checkpoint-*")) or (output / "adapter_config.json").is_file()
    if started and not (resume or overwrite):
        raise ValueError(f"{output}: holds a run already; --resume goes on with it, --overwrite deletes it")
    if resume and (changed := _differences(as_dict(load_config(output / CONFIG)), as_dict(config))):
        Console(stderr=True).print(f"warning: resuming with changes to the run's configuration: {', '.join(changed)}")


def _begin_folder(config: TrainConfig, overwrite: bool) -> None:
    output = Path(config.output)
    if overwrite and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / CONFIG)


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    changed = []
    for key, value in new.items():
        if isinstance(value, dict):
            changed += _differences(old[key], value, f"{prefix}{key}.")
        elif value != old[key]:
            changed.append(f"{prefix}{key} {old[key]} → {value}")
    return changed


def _summary(config: TrainConfig, trainer: T2RTrainer, rows: PackedRows, history: list[dict], dtype: str) -> dict:
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
