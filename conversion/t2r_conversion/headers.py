"""Names, shapes and dtypes of a folder's tensors, from safetensors headers alone."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor's header.

    Attributes:
        shape: its shape.
        dtype: as safetensors spells it ("BF16").
        shard: the file that holds it.
        stored: its name in there, where that is another; None for its own.
        rows: which rows of the tensor in there it is, from and up to; None for all.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: str
    stored: str | None = None
    rows: tuple[int, int] | None = None

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        bits = re.search(r"\d+", self.dtype)
        return self.parameters * (int(bits.group()) if bits else 8) // 8  # BOOL has no number: a byte


def parts_of(stored: str, header: SourceTensor, rows: Mapping[str, int]) -> dict[str, SourceTensor]:
    """The headers of what a file holds under another name, or as one tensor.

    Args:
        stored: the name in the file.
        header: what the file says of it.
        rows: how many each part has, by name and in order; the last has all that are left.
    """
    if len(rows) == 1 or not header.shape:
        return {name: replace(header, stored=None if name == stored else stored) for name in rows}
    ends = [*accumulate(rows.values(), initial=0)]
    ends[-1] = header.shape[0]
    return {
        name: replace(header, shape=(max(0, end - begin), *header.shape[1:]), stored=stored, rows=(begin, end))
        for name, begin, end in zip(rows, ends, ends[1:], strict=False)
    }


def read_headers(folder: Path) -> dict[str, SourceTensor]:
    """The headers of all tensors of a folder, in `model.safetensors` or in the shards that its index names.

    Raises:
        ValueError: there are no weights, the index does not fit the shards, or a shard is truncated or damaged.
    """
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / SINGLE).exists():
        return _read_header(folder / SINGLE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(
            f"{folder}: only pickled weights under names that are not known (pytorch_model.bin is); convert them to "
            "safetensors first (load, save_pretrained)"
        )
    raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}; download the weights first")


def _read_shards(folder: Path) -> dict[str, SourceTensor]:
    index = folder / INDEX
    weight_map = index_of(index)
    shards = sorted(set(weight_map.values()))
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        tensors.update(_read_header(folder / shard))
    astray = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].shard != shard]
    if astray:
        raise ValueError(
            f"{index}: tensors that are not in the shard it names ({', '.join(astray)}); download the model again"
        )
    return tensors


def index_of(index: Path) -> dict[str, str]:
    """Which file holds each tensor, as an index says.

    Raises:
        ValueError: it says nothing, or names files that are not there or are outside its folder.
    """
    weight_map = read_json(index, "cannot find the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise ValueError(f"{index}: no weight_map; download the file again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or shard in ("", "..")]
    if outside:
        raise ValueError(f"{index}: names files outside its folder ({', '.join(outside)}); do not trust this model")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(f"{index}: names shards that are not there ({', '.join(missing)}); download them again")
    return weight_map


def write_index(weight_map: dict[str, str], path: Path, **metadata: int) -> None:
    """Write an index that says which file holds each tensor."""
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_header(path: Path) -> dict[str, SourceTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: SourceTensor(tuple(part.get_shape()), part.get_dtype(), path.name)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({one_line(error)}); download it again") from error


def read_json(path: Path, without: str) -> dict:
    """A JSON object from a file; `without` says what to do when it is missing.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; {without}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
