"""A finetune back into one model folder: from its run, or from what was pushed of it."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import AutoConfig

from t2r.evaluation import load_model
from t2r.model import T2RForCausalLM
from t2r.training.folder import CONFIG
from t2r.training.portable import adapter_folder, base_folder, base_name, check_finished, finetuned, merged
from t2r_conversion import open_source
from t2r_conversion.record import read_record, write_record
from t2r_conversion.source import copy_small_files
from t2r_conversion.writer import check_output, check_space, made_whole


def merge(run: str | Path, out: str | Path, *, base: str | Path | None = None, overwrite: bool = False) -> None:
    """Write the model that a run has finetuned, adapters merged, beside tokenizer and record.

    Args:
        run: folder of a finished `t2r train`, or what `t2r push --adapter-only` has made of it: a folder or a Hub id.
        out: folder to make.
        base: of what was pushed: the model that was converted, if it is not to be the one that the adapter names.
        overwrite: replace the model that is there.

    Raises:
        ValueError: the run is not finished, its base model is gone or another, `out` exists, or the disk is too full.
    """
    folder, out = Path(run), Path(out).absolute()
    if (folder / CONFIG).is_file():
        if base is not None:
            raise ValueError(f"{run}: a run names its model itself, in {CONFIG}; leave the base out")
        check_finished(folder)
        source = base_folder(folder)
        _write(folder, source, partial(_merged_run, folder, source), out, overwrite)
        return
    folder = adapter_folder(run)
    with open_source(base or base_name(folder)) as opened:
        _write(folder, opened.folder, partial(finetuned, opened, folder), out, overwrite)


def _write(run: Path, source: Path, load: Callable[[], T2RForCausalLM], out: Path, overwrite: bool) -> None:
    for needed in (source, run):
        check_output(out, needed, overwrite)
    check_space(out, sum(file.stat().st_size for file in source.glob("*.safetensors")))
    model = load()
    with made_whole(out) as partial_folder:
        model.save_pretrained(partial_folder)
        copy_small_files(source, partial_folder)
        write_record(partial_folder, read_record(run))
        for report in run.glob("report.*"):
            shutil.copyfile(report, partial_folder / report.name)


def _merged_run(run: Path, base: Path) -> T2RForCausalLM:
    """The base model, in its own dtype, with the run's adapters and added parameters (or all its weights) in it."""
    if not (run / "adapter_config.json").is_file():
        return load_model(run, dtype="own", device="cpu").to(AutoConfig.from_pretrained(base).dtype)
    return merged(load_model(base, dtype="own", device="cpu"), run)
