"""Carry a plan out, one shard at a time, in a temporary folder that takes its name only when it is complete."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import save_file

import t2r
from t2r_conversion.headers import INDEX, write_index
from t2r_conversion.plan import DTYPES, Plan, PlannedTensor
from t2r_conversion.record import write_record
from t2r_conversion.shards import Part, copy_tensors, take_over
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
    fitted: Mapping[str, torch.Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    hard_link: bool = False,
    max_shard_size: int | None = None,
) -> None:
    """Write the converted model.

    Shards that stay as they are are taken over as files (see `take_over`); others are written tensor by tensor; new
    tensors go to one more shard. An error or an interruption leaves nothing behind.

    Args:
        plan: its source must come from `open_source`, which may still have to download or unpack.
        out: folder to make.
        overwrite: replace the model that is there, once the new one is complete.
        progress: called after each shard.
        fitted: values of new tensors by name, in place of those that they start with.
        about: what else to record.
        hard_link: share the files of untouched shards with the source.
        max_shard_size: most bytes of the source's tensors in a shard, but for a tensor that is larger; None for shards
            as the source has them.

    Raises:
        ValueError: the weights are not on this machine; `out` exists, is not a model's folder, or holds the source;
            or the disk is too full.
    """
    if plan.source.kind != "folder":
        raise ValueError(f"{plan.source.name}: only its headers were read; plan from `open_source`")
    out = Path(out).absolute()
    check_output(out, plan.source.folder, overwrite)
    with made_whole(out) as partial:
        shards = _shards(plan, max_shard_size)
        check_space(out, _bytes_to_write(plan, shards, hard_link and can_link(plan.source, out)))
        partial.mkdir(parents=True)
        came = _write_weights(plan, shards, partial, progress or (lambda _done, _total: None), fitted or {}, hard_link)
        copy_small_files(plan.source.folder, partial)
        plan.config.save_pretrained(partial)  # with the code of the model
        write_record(partial, {"conversion": {**_record(plan), "shards": came, **(about or {})}})


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


def _shards(plan: Plan, max_shard_size: int | None) -> list[list[PlannedTensor]]:
    """The source's tensors that are kept, by the shard that they go to."""
    tensors = sorted(plan.having("copied"), key=lambda tensor: tensor.shard)
    if max_shard_size is None:
        return [list(group) for _, group in groupby(tensors, key=lambda tensor: tensor.shard)]
    shards: list[list[PlannedTensor]] = []
    for tensor in tensors:
        if not shards or sum(other.bytes for other in shards[-1]) + tensor.bytes > max_shard_size:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _source_of(plan: Plan, tensors: list[PlannedTensor]) -> Path | None:
    """The source's file that holds these tensors as they are and no others, if there is one."""
    names = {tensor.name for tensor in tensors}
    shards = {tensor.shard for tensor in tensors}
    there = {name for name, header in plan.source.tensors.items() if header.shard in shards}
    headers = [plan.source.tensors[tensor.name] for tensor in tensors]
    as_it_is = all(t.dtype == h.dtype and h.stored is None for t, h in zip(tensors, headers, strict=True))
    return plan.source.folder / shards.pop() if len(shards) == 1 and there == names and as_it_is else None


def _bytes_to_write(plan: Plan, shards: list[list[PlannedTensor]], links: bool) -> int:
    taken_over = plan.source.temporary or links
    written = [tensors for tensors in shards if not (taken_over and _source_of(plan, tensors))]
    weights = sum(tensor.bytes for tensors in [*written, plan.having("new")] for tensor in tensors)
    return weights + sum(file.stat().st_size for file in small_files(plan.source.folder))


def _write_weights(
    plan: Plan,
    shards: list[list[PlannedTensor]],
    folder: Path,
    progress: Progress,
    fitted: Mapping[str, torch.Tensor],
    hard_link: bool,
) -> dict[str, int]:
    """All shards and the index; returns how many shards came in which way."""
    new = plan.having("new")
    count = len(shards) + bool(new)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = {tensor.name: name for tensors, name in zip([*shards, new], names, strict=False) for tensor in tensors}
    came: Counter[str] = Counter()
    done, total = 0, sum(tensor.bytes for tensor in plan.having("copied", "new"))
    for tensors, name in zip(shards, names, strict=False):
        whole = _source_of(plan, tensors)
        if whole is None:
            copy_tensors(folder / name, [_part(plan.source, tensor) for tensor in tensors])
            came["written"] += 1
        elif plan.source.temporary:
            shutil.move(whole, folder / name)
            came["written"] += 1
        else:
            came[take_over(whole, folder / name, hard_link)] += 1
        done += sum(tensor.bytes for tensor in tensors)
        progress(done, total)
    if new:
        _write_new(new, folder / names[-1], fitted)
        came["written"] += 1
        progress(total, total)
    _write_index(plan, files, folder / INDEX)
    return dict(came)


def _part(source: Source, tensor: PlannedTensor) -> Part:
    header = source.tensors[tensor.name]
    return Part(source.folder / header.shard, header.stored or tensor.name, tensor.name, tensor.dtype, header.rows)


def _write_new(tensors: list[PlannedTensor], path: Path, fitted: Mapping[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    values = {}
    for tensor in tensors:
        random = torch.empty(tensor.shape).normal_(tensor.mean, tensor.std, generator=generator)
        values[tensor.name] = fitted.get(tensor.name, random).to(DTYPES[tensor.dtype])
    save_file(values, path, metadata={"format": "pt"})


def _write_index(plan: Plan, files: dict[str, str], path: Path) -> None:
    written = plan.having("copied", "new")
    metadata = {
        "total_parameters": sum(tensor.parameters for tensor in written),
        "total_size": sum(tensor.bytes for tensor in written),
    }
    write_index(files, path, **metadata)


def _record(plan: Plan) -> dict:
    packages = (t2r, torch, transformers, safetensors)
    return {
        **plan.summary(),
        "versions": {package.__name__: package.__version__ for package in packages},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
