"""Where a model comes from: its configuration, and its tensors' names, shapes and dtypes. No tensor is read."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import get_safetensors_metadata, metadata_load, snapshot_download
from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from transformers import AutoConfig, PreTrainedConfig
from yaml import YAMLError

from t2r_conversion.families import Family, family_of
from t2r_conversion.fla import renamed
from t2r_conversion.fla_config import read_fla_config
from t2r_conversion.gguf import read_gguf_header, unpack_gguf
from t2r_conversion.headers import INDEX, SINGLE, SourceTensor, one_line, read_headers, read_json
from t2r_conversion.pickles import pickled, read_pickles, unpack_pickles

CARD = "README.md"  # read for its licence; the converted model gets a card of its own

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
class Source:
    """A source model, known by its headers.

    Attributes:
        name: a Hub id, or the last component of a local path.
        kind: "folder", "hub" (weights not downloaded), "gguf" or "pickle" (weights not unpacked).
        folder: where its files are.
        family: its family.
        config: its configuration.
        tensors: its tensors' headers by name, as the converted model has it.
        temporary: whether its files may be moved away.
        license: what its model card or GGUF header names, or None.
    """

    name: str
    kind: str
    folder: Path
    family: Family
    config: PreTrainedConfig
    tensors: dict[str, SourceTensor]
    temporary: bool = False
    license: str | None = None


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
        scratch: folder to unpack a GGUF file or pickled weights in; emptied first and removed afterwards; one among the
            system's temporary files when not given.

    Raises:
        ValueError: as `read_source`, or the weights cannot be had.
    """
    if not isinstance(source, Source):
        source = read_source(source)
    if source.kind == "folder":
        yield source
    elif source.kind == "hub":
        shards = sorted({tensor.shard for tensor in source.tensors.values()})
        folder = _download(source.name, [*shards, INDEX, "config.json", CARD, *SMALL_FILES])
        with open_source(_read_folder(folder, source.name), scratch=scratch) as opened:
            yield opened
    else:
        folder = Path(scratch or mkdtemp(prefix="t2r-"))
        try:
            _empty(folder)
            yield replace(_unpacked(source, folder), temporary=True, license=source.license)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _unpacked(source: Source, folder: Path) -> Source:
    if source.kind == "gguf":
        unpack_gguf(source.folder / source.name, source.config, folder)
        return _read_folder(folder, source.name)
    copy_small_files(source.folder, folder)
    unpack_pickles(source.folder, folder)
    return _read_folder(folder, source.name)


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def small_files(folder: Path) -> list[Path]:
    """The files that come along beside the weights."""
    return sorted({file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()})


def copy_small_files(folder: Path, to: Path) -> None:
    """Copy tokenizer, generation settings, chat template and licence of one model folder into another."""
    for file in small_files(folder):
        target = to / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _read_folder(folder: Path, name: str) -> Source:
    family, config = _read_config(folder)
    if pickled(folder) and not any((folder / file).exists() for file in (SINGLE, INDEX)):
        return _source(name, "pickle", folder, family, config, read_pickles(folder))
    return _source(name, "folder", folder, family, config, read_headers(folder))


def _source(
    name: str, kind: str, folder: Path, family: Family, config: PreTrainedConfig, tensors: dict[str, SourceTensor]
) -> Source:
    tensors = renamed(tensors, config, str(folder)) if family.recurrent else family.taken_apart(tensors, config)
    return Source(name, kind, folder, family, config, tensors, license=_licence(folder))


def _read_hub(name: str) -> Source:
    folder = _download(name, ["config.json", INDEX, CARD, *SMALL_FILES])
    family, config = _read_config(folder)
    try:
        tensors = read_headers(folder)
    except ValueError:
        pass  # not downloaded before: the headers can be had alone
    else:
        return _source(name, "folder", folder, family, config, tensors)
    try:
        files = get_safetensors_metadata(name).files_metadata
    except (HTTPError, OSError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(
            f"{name}: no safetensors weights can be read from the Hub ({one_line(error)}); if it has pickled ones, "
            f"download it (hf download {name}) and convert the folder"
        ) from error
    tensors = {
        tensor: SourceTensor(tuple(info.shape), info.dtype, shard)
        for shard, header in files.items()
        for tensor, info in header.tensors.items()
    }
    return _source(name, "hub", folder, family, config, tensors)


def _read_gguf(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    family, config, shapes, licence = read_gguf_header(path)
    tensors = {name: SourceTensor(shape, "F32", SINGLE) for name, shape in shapes.items()}
    return Source(path.name, "gguf", path.parent, family, config, family.taken_apart(tensors, config), license=licence)


def _licence(folder: Path) -> str | None:
    if not (folder / CARD).is_file():
        return None
    try:
        licence = (metadata_load(folder / CARD) or {}).get("license")
    except (ValueError, YAMLError):  # a card that cannot be read names none
        return None
    return licence if isinstance(licence, str) else None


def _download(name: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{name}: neither a local folder nor a model that the Hub gives out ({one_line(error)})"
        ) from error


def _read_config(folder: Path) -> tuple[Family, PreTrainedConfig]:
    raw = read_json(folder / "config.json", "give a Hugging Face model folder")
    family = family_of(raw.get("model_type"), raw.get("architectures"), f"{folder / 'config.json'}")
    if family.recurrent:
        return family, read_fla_config(raw, str(folder / "config.json"))
    try:
        return family, AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of fields that make no sense
        raise ValueError(f"{folder / 'config.json'}: {one_line(error)}") from error
