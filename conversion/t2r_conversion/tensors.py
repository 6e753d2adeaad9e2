"""Tensors of safetensors files, as they are; they are read from the disk when they are looked at."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from t2r_conversion.headers import SourceTensor

LOOKED_AT = 2048  # numbers of each tensor


def read_tensors(folder: Path, headers: dict[str, SourceTensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Some of a folder's tensors.

    Args:
        folder: with safetensors files.
        headers: what `read_headers` says of them.
        names: of the tensors wanted.
    """
    wanted = set(names)
    tensors = {}
    for shard in sorted({headers[name].shard for name in wanted}):
        with safe_open(folder / shard, framework="pt") as file:
            for name in sorted(name for name in wanted if headers[name].shard == shard):
                stored, rows = headers[name].stored or name, headers[name].rows
                tensors[name] = file.get_slice(stored)[slice(*rows)] if rows else file.get_tensor(stored)
    return tensors


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """What tells a model's weights from another's of the same shapes: a hash of the beginning of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        beginning = tensors[name].flatten()[:LOOKED_AT].contiguous()
        digest.update(name.encode() + beginning.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
