"""The form of a benchmark's JSON file."""

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "flash-linear-attention")


def write_results(name: str, rows: list[dict], out: Path) -> Path:
    """Write `OUT/NAME.json`: the command, where and with what it ran, and its rows.

    Args:
        name: of the benchmark.
        rows: `{"name", "unit", "ours": number}`, and each peer by its own key.
        out: folder, made if it is not there.
    """
    content = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def hardware() -> str:
    """What tensors are computed on here."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def commit() -> str | None:
    """The commit that runs; None outside a repository."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None
