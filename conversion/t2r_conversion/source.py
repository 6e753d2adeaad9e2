"""Where a model comes from: its configuration, and its tensors' names, shapes and dtypes. No tensor is read."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from t2r_conversion.families import Family, family_of
from t2r_conversion.gguf import read_gguf_header, unpack_gguf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What comes along beside the weights: tokenizer, generation settings, chat template and licence.
SMALL_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "chat_template.j*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor's header: shape, dtype as safetensors spells it ("BF16"), and the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    shard: str

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        bits = re.search(r"\d+", self.dtype)
        return self.parameters * (int(bits.group()) if bits else 8) // 8  # BOOL has no number: a byte


@dataclass(frozen=True)
class Source:
    """A source model, known by its headers.

    Attributes:
        name: a Hub id, or the last component of a local path.
        kind: "folder", "hub" (weights not downloaded) or "gguf" (weights not unpacked).
        folder: where its files are.
        family: its family.
        config: its configuration.
        tensors: its tensors' headers by name.
        temporary: whether its files may be moved away.
    """

    name: str
    kind: str
    folder: Path
    family: Family
    config: PreTrainedConfig
    tensors: dict[str, SourceTensor]
    temporary: bool = False


def read_source(source: str | Path) -> Source:
    """Read the headers of a model: a local Hugging Face folder, a `.gguf` file, or a Hub id.

    Raises:
        ValueError: there is no such model, its family is not supported, or its files are broken.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if path.is_dir():
        return _read_folder(path, path.resolve().name)
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ValueError(f"{source}: no such folder; give a Hugging Face folder, a .gguf file or a Hub id")
    return _read_hub(str(source))


@contextmanager
def open_source(source: str | Path | Source, *, scratch: str | Path | None = None) -> Iterator[Source]:
    """A model with its weights in safetensors files on this machine, downloaded or unpacked if they must be.

    Args:
        source: what `read_source` takes, or what it returned.
        scratch: folder to unpack a GGUF file in, emptied first and removed afterwards; one among the system's
            temporary files when not given.

    Raises:
        ValueError: as `read_source`, or the weights cannot be had.
    """
    if not isinstance(source, Source):
        source = read_source(source)
    if source.kind == "folder":
        yield source
    elif source.kind == "hub":
        shards = sorted({tensor.shard for tensor in source.tensors.values()})
        yield _read_folder(_download(source.name, [*shards, INDEX, "config.json", *SMALL_FILES]), source.name)
    else:
        folder = Path(scratch or mkdtemp(prefix="t2r-"))
        try:
            _empty(folder)
            unpack_gguf(source.folder / source.name, source.config, folder)
            yield replace(_read_folder(folder, source.name), temporary=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _read_folder(folder: Path, name: str) -> Source:
    family, config = _read_config(folder)
    return Source(name, "folder", folder, family, config, _read_headers(folder))


def _read_hub(name: str) -> Source:
    folder = _download(name, ["config.json", INDEX, *SMALL_FILES])
    family, config = _read_config(folder)
    try:
        return Source(name, "folder", folder, family, config, _read_headers(folder))
    except ValueError:
        pass  # not downloaded before: the headers can be had alone
    try:
        files = get_safetensors_metadata(name).files_metadata
    except (OSError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{name}: no safetensors weights can be read from the Hub ({_line(error)})") from error
    tensors = {
        tensor: SourceTensor(tuple(info.shape), info.dtype, shard)
        for shard, header in files.items()
        for tensor, info in header.tensors.items()
    }
    return Source(name, "hub", folder, family, config, tensors)


def _read_gguf(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    family, config, shapes = read_gguf_header(path)
    tensors = {name: SourceTensor(shape, "F32", SINGLE) for name, shape in shapes.items()}
    return Source(path.name, "gguf", path.parent, family, config, tensors)


def _download(name: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: neither a local folder nor a model that the Hub gives out ({_line(error)})"
        ) from error


def _read_config(folder: Path) -> tuple[Family, PreTrainedConfig]:
    raw = _read_json(folder / "config.json", "give a Hugging Face model folder")
    family = family_of(raw.get("model_type"), raw.get("architectures"), f"{folder / 'config.json'}")
    try:
        return family, AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {_line(error)}") from error


def _read_headers(folder: Path) -> dict[str, SourceTensor]:
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / SINGLE).exists():
        return _read_header(folder / SINGLE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(f"{folder}: only pickled weights; convert them to safetensors first (load, save_pretrained)")
    raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}; download the weights first")


def _read_shards(folder: Path) -> dict[str, SourceTensor]:
    index = folder / INDEX
    weight_map = _read_json(index, "cannot find the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map; download the file again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or shard in ("", "..")]
    if outside:
        raise ValueError(f"{index}: names files outside its folder ({', '.join(outside)}); do not trust this model")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(f"{index}: names shards that are not there ({', '.join(missing)}); download them again")
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        tensors.update(_read_header(folder / shard))
    astray = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].shard != shard]
    if astray:
        raise ValueError(
            f"{index}: tensors that are not in the shard it names ({', '.join(astray)}); download the model again"
        )
    return tensors


def _read_header(path: Path) -> dict[str, SourceTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: SourceTensor(tuple(part.get_shape()), part.get_dtype(), path.name)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({_line(error)}); download it again") from error


def _read_json(path: Path, without: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; {without}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
