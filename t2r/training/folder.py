"""A run's folder: what may be written, where to go on from, and whether it has come to its end."""

import shutil
from pathlib import Path

from rich.console import Console

from t2r.training.config import TrainConfig
from t2r.training.recipe import as_dict, load_config, save_config
from t2r_conversion.record import read_record

CONFIG = "config.yaml"


def is_finished(run: Path) -> bool:
    """Whether a folder holds a finetune that has come to its end."""
    record = read_record(run)
    evaluated = "after" in record.get("evaluation", {"after": None})
    return holds_result(run) and "training" in record and evaluated


def holds_result(run: Path) -> bool:
    """Whether a folder holds what a run ends with: adapters, or a whole model."""
    return (run / "adapter_config.json").is_file() or (run / "config.json").is_file()


def check_folder(config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that may not be written. Warns when a resumed run's configuration has changed.

    Raises:
        ValueError: it holds something else, or a run that is to be neither resumed nor overwritten.
    """
    output = Path(config.output)
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / CONFIG).is_file():
        raise ValueError(f"{output}: not empty and no t2r train run; choose another output")
    started = any(output.glob("*/checkpoint-*")) or holds_result(output)
    if started and not (resume or overwrite):
        raise ValueError(f"{output}: holds a run already; --resume goes on with it, --overwrite deletes it")
    if resume and (changed := _differences(as_dict(load_config(output / CONFIG)), as_dict(config))):
        Console(stderr=True).print(f"warning: resuming with changes to the run's configuration: {', '.join(changed)}")


def begin_folder(config: TrainConfig, overwrite: bool) -> None:
    """Make the folder, emptied first with `overwrite`, and write the resolved configuration into it."""
    output = Path(config.output)
    if overwrite and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / CONFIG)


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    changed = []
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changed += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            changed.append(f"{prefix}{key} {before} → {now}")
    return changed
