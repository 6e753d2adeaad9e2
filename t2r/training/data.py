"""Documents, tokenised once and packed into rows without letting one document see another."""

import hashlib
import json
import os
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from t2r.evaluation.text import read_text

IGNORED = -100
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus.

    Attributes:
        ids: all documents' tokens one after another, each ended by the end-of-sequence token, int32 `[total]`.
        bounds: where documents begin and end, int64 `[documents + 1]`.
    """

    ids: np.ndarray
    bounds: np.ndarray


def tokenise(files: list[str], column: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenise text files, or reuse what an earlier call with the same content and tokenizer left in the cache.

    The cache is in `T2R_CACHE` (`~/.cache/t2r` when not set).

    Args:
        files: `.txt` (a document each), `.jsonl`, `.json` or `.parquet`.
        column: the text column of the latter three.
        tokenizer: of the model that is trained.

    Raises:
        ValueError: a file is missing, empty, of another kind, not UTF-8 or lacks the column.
    """
    paths = [Path(f) for f in files]
    for path in paths:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(f"{path}: {'no such file' if not path.is_file() else 'the file is empty'}")
    cache = Path(os.environ.get("T2R_CACHE", "~/.cache/t2r")).expanduser()
    folder = cache / f"tokens-{_fingerprint(paths, column, tokenizer)}"
    if not folder.exists():
        _write(folder, [_load(path, column) for path in paths], tokenizer)
    return Tokens(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "bounds.npy"))


def _load(path: Path, column: str):
    """A `datasets.Dataset` with the column `text`, a document a row."""
    import datasets

    if path.suffix == ".txt":
        return datasets.Dataset.from_dict({"text": [read_text(path)]})
    if path.suffix not in LOADERS:
        raise ValueError(f"{path}: data files are .txt, {', '.join(LOADERS)}, not {path.suffix or 'without a suffix'}")
    try:
        if path.suffix != ".parquet":  # the JSON reader lets broken bytes through
            with path.open(encoding="utf-8") as lines:
                deque(lines, maxlen=0)
        rows = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets wraps whatever its readers raise
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path}: not readable as {LOADERS[path.suffix]} in UTF-8: {cause}") from error
    if column not in rows.column_names:
        raise ValueError(f"{path}: no column {column!r}; it has {', '.join(rows.column_names)}. Set data.column")
    kind = getattr(rows.features[column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(f"{path}: column {column!r} holds {kind or 'lists or objects'}, not text. Set data.column")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _write(folder: Path, parts: list, tokenizer: PreTrainedTokenizerBase) -> None:
    import datasets

    def encode(batch):
        texts = [text for text in batch["text"] if text]
        ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []  # begins as the model expects it
        end = tokenizer.eos_token_id
        return {"ids": [document if document[-1:] == [end] else [*document, end] for document in ids]}

    rows = datasets.concatenate_datasets(parts)
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenising")
    if "ids" not in rows.column_names:  # not one document was left
        raise ValueError("the data files hold no text")
    bounds = np.cumsum([0, *(len(document) for document in rows["ids"])])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        ids = np.lib.format.open_memmap(partial / "ids.npy", mode="w+", dtype=np.int32, shape=(int(bounds[-1]),))
        for document, start in zip(rows["ids"], bounds, strict=False):
            ids[start : start + len(document)] = document
        ids.flush()
        np.save(partial / "bounds.npy", bounds)
        if not folder.exists():
            with suppress(OSError):  # another run was quicker, with the same tokens
                partial.rename(folder)


def _fingerprint(paths: list[Path], column: str, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    digest.update(f"{column} {tokenizer.eos_token_id} {rules}".encode())
    return digest.hexdigest()[:16]


class PackedRows(Dataset):
    """Rows of `sequence_length` tokens, cut one after another from the corpus; the incomplete last one is dropped.

    A document that a row's end cuts goes on in the next row as a document of its own.

    Raises:
        ValueError: the corpus is shorter than one row.
    """

    def __init__(self, tokens: Tokens, sequence_length: int):
        self.tokens, self.length = tokens, sequence_length
        if len(self) == 0:
            raise ValueError(
                f"the data files hold {len(tokens.ids)} tokens, less than one row of {sequence_length}: "
                "add text or lower data.sequence_length"
            )

    def __len__(self) -> int:
        return len(self.tokens.ids) // self.length

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """`input_ids`, int64 `[sequence_length]`; `starts`, the documents' first places, int64, from 0; and `row`."""
        start = row * self.length
        end = start + self.length
        bounds = self.tokens.bounds
        inside = bounds[np.searchsorted(bounds, start, "right") : np.searchsorted(bounds, end, "left")] - start
        ids = torch.from_numpy(self.tokens.ids[start:end].astype(np.int64))
        return {"input_ids": ids, "starts": torch.tensor([0, *inside.tolist()]), "row": row}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten rows into one, `[1, total]`, with the bounds of all documents in it and the `rows`' numbers.

    A document's first token is nobody's target: its predecessor belongs to another document.
    """
    lengths = torch.tensor([0] + [len(row["input_ids"]) for row in rows]).cumsum(0)
    starts = torch.cat([row["starts"] + offset for row, offset in zip(rows, lengths[:-1], strict=True)])
    input_ids = torch.cat([row["input_ids"] for row in rows])
    labels = input_ids.clone()
    labels[starts] = IGNORED
    cu_seqlens = torch.cat([starts, lengths[-1:]]).to(torch.int32)
    numbers = [row["row"] for row in rows]
    return {"input_ids": input_ids[None], "labels": labels[None], "cu_seqlens": cu_seqlens, "rows": numbers}
