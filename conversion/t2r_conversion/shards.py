"""Safetensors files as bytes: taken over whole, or tensor by tensor under other names. None is read as numbers."""

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

COPY_BYTES = 1 << 20
FICLONE = 0x40049409  # Linux: let a file share another's extents until one of them is written to


def take_over(source: Path, target: Path, hard_link: bool = False) -> str:
    """Make `target` what `source` is, in the cheapest way there is.

    Args:
        source: a file, or a link to one.
        target: must not exist.
        hard_link: make it the same file, where the file system can: who writes to one then writes to both.

    Returns:
        "linked", "cloned" (a copy that shares the bytes until one of the two changes) or "copied".
    """
    source = source.resolve()
    if hard_link:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return "linked"
    if _clone(source, target):
        return "cloned"
    shutil.copyfile(source, target)
    return "copied"


def _clone(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return False
    try:
        with source.open("rb") as reader, target.open("xb") as writer:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
    except OSError:  # the file system cannot, or it is another one
        target.unlink(missing_ok=True)
        return False
    return True


def copy_tensors(source: Path, target: Path, names: Mapping[str, Sequence[str]]) -> None:
    """Copy tensors of a safetensors file into another, as bytes: memory does not depend on their sizes.

    Args:
        source: a safetensors file.
        target: the file to write.
        names: for each tensor to copy, what it is called in `target`; of several names each gets an equal part of its
            rows, in order.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        (length,) = struct.unpack("<Q", reader.read(8))
        header = json.loads(reader.read(length))
        spans = sorted((*header[name]["data_offsets"], name) for name in names)
        kept, offset = {"__metadata__": {"format": "pt"}}, 0
        for begin, end, name in spans:
            parts, shape, size = names[name], header[name]["shape"], (end - begin) // len(names[name])
            if len(parts) > 1:
                shape = [shape[0] // len(parts), *shape[1:]]
            for part in parts:
                kept[part] = header[name] | {"shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
        encoded = json.dumps(kept).encode()
        encoded += b" " * (-len(encoded) % 8)  # safetensors keeps the data aligned
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        for begin, end, _ in spans:
            reader.seek(8 + length + begin)
            _copy_bytes(reader, writer, end - begin)


def _copy_bytes(reader, writer, count: int) -> None:
    while count:
        block = reader.read(min(count, COPY_BYTES))
        if not block:
            raise ValueError(f"{reader.name}: ended early; download it again")
        writer.write(block)
        count -= len(block)
