"""Text files, read strictly: a perplexity over half a file, or over mended bytes, is no perplexity."""

from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark.

    Raises:
        ValueError: the file is missing, a folder, empty, or not UTF-8 (with the offset of the first bad byte).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder, not a text file' if path.is_dir() else 'no such text file'}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8, byte 0x{data[error.start]:02x} at offset {error.start}; "
            f"convert it first, for example: iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: the text is empty")
    return text
