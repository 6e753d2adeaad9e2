"""`t2r_record.json`: what a model folder knows of its own making. Cards and reports are written from it alone."""

import json
from pathlib import Path

RECORD = "t2r_record.json"


def read_record(folder: str | Path) -> dict:
    """The folder's record, empty if it has none.

    Raises:
        ValueError: the file is not JSON.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it to go on without a record") from error


def write_record(folder: str | Path, record: dict) -> None:
    """Write the folder's record, whole or not at all."""
    path = Path(folder) / RECORD
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
