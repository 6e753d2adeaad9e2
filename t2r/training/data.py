"""Documents, tokenised once and packed into rows without letting one document see another."""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from t2r.training.config import DataConfig, SourceConfig
from t2r.training.documents import check_source, encoder, fingerprint, load_rows, sources_of
from t2r.training.objective import IGNORED


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus.

    Attributes:
        ids: all documents' tokens one after another, texts and completions ended by the end-of-sequence token, chats as
            their template ends them; int32 `[total]`.
        bounds: where documents begin and end, int64 `[documents + 1]`.
        learn: which tokens have a loss, bool `[total]`; None for all.
    """

    ids: np.ndarray
    bounds: np.ndarray
    learn: np.ndarray | None = None


def tokenise(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenise documents, or reuse what an earlier call with the same content and tokenizer left in the cache.

    The cache is in `T2R_CACHE` (`~/.cache/t2r` when not set).

    Args:
        data: which documents.
        tokenizer: of the model that is trained.

    Raises:
        ValueError: a source is missing, empty, of another kind, not UTF-8 or lacks the columns, or nothing is left
            to learn.
    """
    sources = sources_of(data)
    for source in sources:
        check_source(source)
    cache = Path(os.environ.get("T2R_CACHE", "~/.cache/t2r")).expanduser()
    folder = cache / f"tokens-{_fingerprint(sources, data.column, tokenizer)}"
    if not folder.exists():
        _write(folder, sources, data.column, tokenizer)
    learn = folder / "learn.npy"
    return Tokens(
        np.load(folder / "ids.npy", mmap_mode="r"),
        np.load(folder / "bounds.npy"),
        np.load(learn, mmap_mode="r") if learn.exists() else None,
    )


def _write(folder: Path, sources: list[SourceConfig], column: str, tokenizer: PreTrainedTokenizerBase) -> None:
    import datasets

    parts = []
    for source in sources:
        rows, kind = load_rows(source, column)
        encode, title = encoder(kind, tokenizer), f"tokenising {source.path}"
        try:
            rows = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=title)
        except Exception as error:  # whatever tokenizers and chat templates raise
            raise ValueError(f"{source.path}: {' '.join(str(error).split())}") from error
        parts += [rows] if "ids" in rows.column_names else []  # not one document was left
    if not parts:
        raise ValueError("the data files hold no text")
    rows = datasets.concatenate_datasets(parts)
    bounds = np.cumsum([0, *(len(document) for document in rows["ids"])])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        ids, learn = (
            np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=(int(bounds[-1]),))
            for name, dtype in (("ids", np.int32), ("learn", bool))
        )
        for row, start in zip(rows, bounds, strict=False):
            ids[start : start + len(row["ids"])] = row["ids"]
            learn[start : start + len(row["ids"])] = row["learn"]
        if not learn.any():
            raise ValueError("the data files hold nothing to learn: no completion, and nothing that an assistant says")
        if learn.all():
            (partial / "learn.npy").unlink()
        ids.flush()
        learn.flush()
        np.save(partial / "bounds.npy", bounds)
        if not folder.exists():
            with suppress(OSError):  # another run was quicker, with the same tokens
                partial.rename(folder)


def _fingerprint(sources: list[SourceConfig], column: str, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(fingerprint(source).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    digest.update(f"2 {column} {tokenizer.eos_token_id} {rules} {tokenizer.chat_template}".encode())  # 2: of the format
    return digest.hexdigest()[:16]


class PackedRows(Dataset):
    """Rows of `sequence_length` tokens, cut one after another from the corpus; the incomplete last one is dropped.

    A document that a row's end cuts goes on in the next row as a document of its own. Rows in which there is nothing
    to learn are left out.

    Raises:
        ValueError: the corpus is shorter than one row, or no row has anything to learn.
    """

    def __init__(self, tokens: Tokens, sequence_length: int):
        self.tokens, self.length = tokens, sequence_length
        count = len(tokens.ids) // sequence_length
        if count == 0:
            raise ValueError(
                f"the data files hold {len(tokens.ids)} tokens, less than one row of {sequence_length}: "
                "add text or lower data.sequence_length"
            )
        self.rows = np.arange(count)
        if tokens.learn is not None:
            self.rows = np.array([row for row in self.rows if (self._labels(row) != IGNORED).any()], dtype=int)
        if not len(self.rows):
            raise ValueError(f"no row of {sequence_length} tokens has anything to learn; raise data.sequence_length")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 `[sequence_length]`; `starts`, the documents' first places; and `row`."""
        row = int(self.rows[i])
        ids = self.tokens.ids[row * self.length : (row + 1) * self.length]
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.from_numpy(self._labels(row)),
            "starts": torch.from_numpy(self._starts(row)),
            "row": row,
        }

    def _starts(self, row: int) -> np.ndarray:
        start, end, bounds = row * self.length, (row + 1) * self.length, self.tokens.bounds
        inside = bounds[np.searchsorted(bounds, start, "right") : np.searchsorted(bounds, end, "left")] - start
        return np.concatenate([[0], inside]).astype(np.int64)

    def _labels(self, row: int) -> np.ndarray:
        """Targets. A document's first token is nobody's: its predecessor belongs to another document."""
        here = slice(row * self.length, (row + 1) * self.length)
        labels = self.tokens.ids[here].astype(np.int64)
        if self.tokens.learn is not None:
            labels[~self.tokens.learn[here]] = IGNORED
        labels[self._starts(row)] = IGNORED
        return labels


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten rows into one, `[1, total]`, with the bounds of all documents in it and the `rows`' numbers."""
    lengths = torch.tensor([0] + [len(row["input_ids"]) for row in rows]).cumsum(0)
    starts = torch.cat([row["starts"] + offset for row, offset in zip(rows, lengths[:-1], strict=True)])
    bounds = torch.cat([starts, lengths[-1:]]).to(torch.int32)
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        "cu_seqlens": bounds,
        "max_seqlen": int(bounds.diff().max()),
        "rows": [row["row"] for row in rows],
    }
