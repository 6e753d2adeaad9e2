"""Safetensors files as bytes: taken over whole, or tensor by tensor, under other names or in another dtype."""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from t2r_conversion.headers import DTYPES

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


class Part(NamedTuple):
    """A tensor to copy.

    Attributes:
        source: the safetensors file that holds it.
        stored: its name there.
        name: its name in the target.
        dtype: in the target, as safetensors spells it; None for its own.
        rows: of the tensor there, from and up to; None for all.
    """

    source: Path
    stored: str
    name: str
    dtype: str | None = None
    rows: tuple[int, int] | None = None


def copy_tensors(target: Path, parts: Iterable[Part]) -> None:
    """Write a safetensors file of tensors from others, as bytes: memory does not depend on their sizes.

    Raises:
        ValueError: a source ends early, or a number does not fit into the dtype that is asked for.
    """
    with ExitStack() as files, target.open("wb") as writer:
        readers, spans = {}, []
        for part in parts:
            if part.source not in readers:
                readers[part.source] = _opened(files.enter_context(part.source.open("rb")))
            reader, header, start = readers[part.source]
            entry = header[part.stored]
            begin, end, shape = *entry["data_offsets"], entry["shape"]
            if part.rows is not None:
                first, last = part.rows
                row = (end - begin) // shape[0]
                begin, end, shape = begin + first * row, begin + last * row, [last - first, *shape[1:]]
            spans.append(_Span(reader, start + begin, end - begin, shape, entry["dtype"], part))
        spans.sort(key=lambda span: (span.reader.name, span.begin))
        kept, offset = {"__metadata__": {"format": "pt"}}, 0
        for span in spans:
            dtype, size = span.part.dtype or span.dtype, span.size
            if dtype != span.dtype:
                size = size // DTYPES[span.dtype].itemsize * DTYPES[dtype].itemsize
            kept[span.part.name] = {"dtype": dtype, "shape": span.shape, "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(kept).encode()
        encoded += b" " * (-len(encoded) % 8)  # safetensors keeps the data aligned
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        for span in spans:
            span.reader.seek(span.begin)
            for block in _blocks(span.reader, span.size):
                writer.write(block if span.part.dtype in (None, span.dtype) else _cast(block, span.dtype, span.part))


class _Span(NamedTuple):
    """The bytes of a part, in its source."""

    reader: BinaryIO
    begin: int
    size: int
    shape: list[int]
    dtype: str
    part: Part


def _opened(reader: BinaryIO) -> tuple[BinaryIO, dict, int]:
    """An open safetensors file, its header, and where its data begin."""
    (length,) = struct.unpack("<Q", reader.read(8))
    return reader, json.loads(reader.read(length)), 8 + length


def _blocks(reader: BinaryIO, count: int) -> Iterator[bytes]:
    while count:
        block = reader.read(min(count, COPY_BYTES))
        if not block:
            raise ValueError(f"{reader.name}: ended early; download it again")
        yield block
        count -= len(block)


def _cast(block: bytes, dtype: str, part: Part) -> bytes:
    numbers = torch.frombuffer(bytearray(block), dtype=DTYPES[dtype])
    cast = numbers.to(DTYPES[part.dtype])
    if (cast.isinf() & numbers.isfinite()).any():
        raise ValueError(f"{part.name}: {numbers.abs().max():.3g} is too large for {part.dtype}; choose another dtype")
    return cast.view(torch.uint8).numpy().tobytes()
