"""The text that routers are fitted to, cut into windows."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer

from t2r_conversion.headers import one_line

WINDOW = 1024  # tokens

REFERENCE = "the reference that Python ships"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What routers are fitted to.

    Attributes:
        text: its name.
        windows: its tokens, `[windows, WINDOW or more]`.
        progress: called with the layers done and in all after each.
    """

    text: str
    windows: Tensor
    progress: Progress | None = None

    def as_dict(self) -> dict[str, str | int]:
        """For the record."""
        return {"text": self.text, "tokens": self.windows.numel()}


def calibration_of(
    text: str | Path | None,
    tokens: int,
    num_slots: int,
    tokenizer_folder: Path,
    progress: Progress | None = None,
) -> Calibration:
    """The first windows of a text, each within one document.

    Args:
        text: a `.txt` file, which is one document, or a `.jsonl` file with a `text` in each line; see `check_text`.
            None for English that every CPython ships, the reference behind `help()`.
        tokens: how many at most.
        num_slots: of the head that may have most; windows have twice as many tokens, and at least `WINDOW`.
        tokenizer_folder: of the source.
        progress: see `Calibration`.

    Raises:
        ValueError: it has no document of a window's length or is not UTF-8, or the source has no tokenizer.
    """
    windows, window = [], max(WINDOW, 2 * num_slots)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except Exception as error:  # whatever transformers and tokenizers raise
        raise ValueError(
            "the source has no tokenizer that works, so routers cannot be fitted to a text; use start 'window' "
            f"({one_line(error)})"
        ) from error
    for document in [reference()] if text is None and window > WINDOW else _documents(text):
        wanted = tokens // window - len(windows)
        if wanted <= 0:
            break
        ids = tokenizer(document[: 16 * window * wanted], add_special_tokens=False, verbose=False)["input_ids"]
        windows += torch.tensor(ids).split(window)[: min(wanted, len(ids) // window)]
    if not windows:
        raise ValueError(
            f"{text or REFERENCE}: no document, or none of {window} tokens, to calibrate on; use a longer text, more "
            "calibration tokens, or start 'window'"
        )
    return Calibration(Path(text).name if text else REFERENCE, torch.stack(windows), progress)


def reference() -> str:
    """The text that `REFERENCE` names, whole."""
    return "\n\n".join(topic for _, topic in sorted(topics.items()))


def _documents(text: str | Path | None) -> Iterator[str]:
    if text is None:
        yield from (topic for _, topic in sorted(topics.items()))
        return
    text = Path(text)
    try:
        with text.open(encoding="utf-8") as file:
            if text.suffix != ".jsonl":
                yield file.read()
            else:
                yield from (_text_of(line, f"{text}, line {i}") for i, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: not UTF-8 ({one_line(error)})") from error


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({one_line(error)})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: no `text` to calibrate on")
    return row["text"]


def check_text(text: str | Path) -> None:
    """Raise ValueError if there is no such file."""
    if not Path(text).is_file():
        raise ValueError(f"{text}: no such file to calibrate on")
