"""A finetuned run back into one model folder."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig

from t2r.evaluation import load_model
from t2r.evaluation.loading import locate
from t2r.training.folder import CONFIG, holds_result
from t2r.training.recipe import load_config
from t2r_conversion.record import read_record, write_record
from t2r_conversion.source import copy_small_files
from t2r_conversion.writer import check_output, check_space, made_whole


def merge(run: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write the model that a run has finetuned, adapters merged, beside tokenizer and record.

    Args:
        run: folder of a finished `t2r train`.
        out: folder to make.
        overwrite: replace the model that is there.

    Raises:
        ValueError: the run is not finished, its base model is gone, `out` exists, or the disk is too full.
    """
    run, out = Path(run), Path(out).absolute()
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run}: no {CONFIG}, so this is not the folder of a t2r train run")
    if not holds_result(run) or "training" not in read_record(run):
        raise ValueError(f"{run}: the run is not finished; go on with: t2r train {run / CONFIG} --resume")
    base = load_config(run / CONFIG).model
    location, _ = locate(base)
    source = Path(location) if Path(location).is_dir() else Path(snapshot_download(location))
    check_output(out, source, overwrite)
    check_space(out, sum(file.stat().st_size for file in source.glob("*.safetensors")))
    model = merged_model(run, base)
    with made_whole(out) as partial:
        model.save_pretrained(partial)
        copy_small_files(source, partial)
        write_record(partial, read_record(run))
        for report in run.glob("report.*"):
            shutil.copyfile(report, partial / report.name)


def merged_model(run: Path, base: str) -> torch.nn.Module:
    """The base model, in its own dtype, with the run's adapters and added parameters (or all its weights) in it."""
    if not (run / "adapter_config.json").is_file():
        return load_model(run, dtype="own", device="cpu").to(AutoConfig.from_pretrained(base).dtype)
    model = load_model(base, dtype="own", device="cpu")
    dtype = model.dtype
    merged = PeftModel.from_pretrained(model, run).merge_and_unload()
    return merged.to(dtype)
