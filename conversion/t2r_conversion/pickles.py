"""Pickled weights in (`pytorch_model.bin`): tensors alone are read, no code in them is run."""

import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from t2r_conversion.headers import INDEX, SourceTensor, index_of, one_line, write_index

SINGLE_PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def pickled(folder: Path) -> bool:
    """Whether a folder holds pickled weights."""
    return (folder / PICKLE_INDEX).is_file() or (folder / SINGLE_PICKLE).is_file()


def read_pickles(folder: Path) -> dict[str, SourceTensor]:
    """The names, shapes and dtypes of a folder's pickled tensors. No tensor is read.

    Raises:
        ValueError: a file is missing, damaged, or holds more than tensors.
    """
    tensors = {}
    for file in _files(folder):
        for name, tensor in _load(folder / file, "meta").items():
            tensors[name] = SourceTensor(tuple(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype)), file)
    return tensors


def unpack_pickles(folder: Path, out: Path) -> None:
    """Write a folder's pickled weights as safetensors, file by file, with the configuration beside them.

    Raises:
        ValueError: as `read_pickles`.
    """
    weight_map = {}
    for number, file in enumerate(files := _files(folder), 1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        state = _load(folder / file, "cpu")
        # Tensors may share memory, as a tied head does; safetensors wants each with its own.
        save_file({name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}, out / shard)
        weight_map |= dict.fromkeys(state, shard)
    write_index(weight_map, out / INDEX)
    shutil.copyfile(folder / "config.json", out / "config.json")


def _files(folder: Path) -> list[str]:
    if not (folder / PICKLE_INDEX).is_file():
        return [SINGLE_PICKLE]
    return sorted(set(index_of(folder / PICKLE_INDEX).values()))


def _load(path: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        try:
            state = torch.load(path, map_location=device, mmap=True, weights_only=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors, or is damaged; what it would run is not run ({one_line(error)[:200]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: truncated or damaged ({one_line(error)[:200]}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{path}: not a checkpoint's tensors by name")
    return state
