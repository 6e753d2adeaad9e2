"""Carry a plan out, one shard at a time, in a temporary folder that takes its name only when it is complete."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file

import t2r
from t2r_conversion.calibrate import Calibration, fit_routers
from t2r_conversion.headers import INDEX, write_index
from t2r_conversion.plan import DTYPES, Plan, PlannedTensor
from t2r_conversion.record import write_record
from t2r_conversion.shards import copy_tensors, take_over
from t2r_conversion.source import Source, copy_small_files, small_files

SEED = 0

Progress = Callable[[int, int], None]
"""Called with the bytes of weights done so far and in all, after each shard."""


def write(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    hard_link: bool = False,
) -> None:
    """Write the converted model.

    Untouched shards are taken over as files (see `take_over`); one with dropped tensors is copied without them; new
    tensors go to one more shard. An error or an interruption leaves nothing behind.

    Args:
        plan: its source must come from `open_source`, which may still have to download or unpack.
        out: folder to make.
        overwrite: replace the model that is there, once the new one is complete.
        progress: called after each shard.
        calibration: routed start: what its routers are fitted to.
        hard_link: share the files of untouched shards with the source.

    Raises:
        ValueError: the weights are not on this machine; `out` exists, is not a model's folder, or holds the source;
            or the disk is too full.
    """
    if plan.source.kind != "folder":
        raise ValueError(f"{plan.source.name}: only its headers were read; plan from `open_source`")
    out = Path(out).absolute()
    check_output(out, plan.source.folder, overwrite)
    with made_whole(out) as partial:
        check_space(out, _bytes_to_write(plan, hard_link and can_link(plan.source, out)))
        partial.mkdir(parents=True)
        about = _write_weights(plan, partial, progress or (lambda _done, _total: None), calibration, hard_link)
        copy_small_files(plan.source.folder, partial)
        plan.config.save_pretrained(partial)  # with the code of the model
        write_record(partial, {"conversion": _record(plan) | about})


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output folder that may not be written.

    Raises:
        ValueError: it exists and `overwrite` is not set, it is not a model's folder, or it holds the source.
    """
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out}: exists already; choose another folder, or --overwrite to replace it")
    if not (out / "config.json").is_file():
        raise ValueError(f"{out}: not a model's folder (no config.json), so not overwritten; choose another")
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: holds the source, so not overwritten; choose another folder")


def check_space(out: Path, needed: int) -> None:
    """Refuse to start on a disk that is too full.

    Raises:
        ValueError: fewer than `needed` bytes are free where `out` will be.
    """
    folder = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder}: {needed:,} bytes needed, {free:,} free; make room or choose another disk")


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place if all goes well, and is removed if not."""
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    try:
        yield partial
        for shard in partial.glob("*.safetensors"):  # safetensors makes its files private to the user
            if shard.stat().st_nlink == 1:  # others are the source's too
                shutil.copymode(partial / "config.json", shard)
        _replace(out, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(out: Path, new: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.old-", dir=out.parent) as trash:
        old = out.rename(Path(trash) / out.name)
        try:
            new.rename(out)
        except BaseException:
            old.rename(out)
            raise


def can_link(source: Source, out: Path) -> bool:
    """Whether a model's shards are files on the file system that `out` is to be on."""
    parent = next(parent for parent in out.parents if parent.exists())
    return source.kind == "folder" and source.folder.resolve().stat().st_dev == parent.stat().st_dev


def _bytes_to_write(plan: Plan, links: bool) -> int:
    written = ("new",) if plan.source.temporary or links else ("copied", "new")
    weights = sum(tensor.bytes for tensor in plan.having(*written))
    return weights + sum(file.stat().st_size for file in small_files(plan.source.folder))


def _write_weights(
    plan: Plan, folder: Path, progress: Progress, calibration: Calibration | None, hard_link: bool
) -> dict:
    """All shards and the index; returns what to record: how shards came, and of routers, layer by layer."""
    shards = sorted({tensor.shard for tensor in plan.having("copied")})
    spoilt = {tensor.shard for tensor in plan.having("dropped")}
    new = plan.having("new")
    count = len(shards) + bool(new)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    targets = dict(zip([*shards, None], names, strict=False))  # new tensors have no shard of their own: None
    came: Counter[str] = Counter()
    done, total = 0, sum(tensor.bytes for tensor in plan.having("copied", "new"))
    for shard in shards:
        kept = [tensor for tensor in plan.having("copied") if tensor.shard == shard]
        if shard in spoilt:
            copy_tensors(plan.source.folder / shard, folder / targets[shard], {t.name: [t.name] for t in kept})
            came["written"] += 1
        elif plan.source.temporary:
            shutil.move(plan.source.folder / shard, folder / targets[shard])
            came["written"] += 1
        else:
            came[take_over(plan.source.folder / shard, folder / targets[shard], hard_link)] += 1
        done += sum(tensor.bytes for tensor in kept)
        progress(done, total)
    fitted, about = {}, {}
    if calibration:
        files = {tensor.name: folder / targets[tensor.shard] for tensor in plan.having("copied")}
        fit = fit_routers(plan.config, files, calibration.windows, calibration.progress)
        fitted, figures = fit.tensors, {"r_squared": fit.r_squared, "errors": fit.errors}
        figures = {name: [round(x, 4) for x in each] for name, each in figures.items()}
        about = {"calibration": calibration.as_dict() | figures}
    if new:
        _write_new(new, folder / targets[None], fitted)
        came["written"] += 1
        progress(total, total)
    _write_index(plan, targets, folder / INDEX)
    return {"shards": dict(came)} | about


def _write_new(tensors: list[PlannedTensor], path: Path, fitted: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    values = {}
    for tensor in tensors:
        random = torch.empty(tensor.shape).normal_(tensor.mean, tensor.std, generator=generator)
        values[tensor.name] = fitted.get(tensor.name, random).to(DTYPES[tensor.dtype])
    save_file(values, path, metadata={"format": "pt"})


def _write_index(plan: Plan, targets: dict[str | None, str], path: Path) -> None:
    written = plan.having("copied", "new")
    metadata = {
        "total_parameters": sum(tensor.parameters for tensor in written),
        "total_size": sum(tensor.bytes for tensor in written),
    }
    write_index({tensor.name: targets[tensor.shard] for tensor in written}, path, **metadata)


def _record(plan: Plan) -> dict:
    packages = (t2r, torch, transformers, safetensors)
    return {
        **plan.summary(),
        "versions": {package.__name__: package.__version__ for package in packages},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
