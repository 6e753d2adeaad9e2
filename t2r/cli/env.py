"""`t2r env`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from t2r.cli.console import out, print_json, size
from t2r.cli.options import Json

PACKAGES = (
    "t2r",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "peft",
    "accelerate",
    "datasets",
    "flash-linear-attention",
)


def env(json: Json = False) -> None:
    """Versions and devices, as a bug report wants them."""
    facts = environment()
    if json:
        print_json(facts)
        return
    table = Table(title="Environment", show_header=False)
    for name in ("python", "platform", "cpus", "backend"):
        table.add_row(name, str(facts[name]))
    for name, installed in facts["packages"].items():
        table.add_row(name, installed or "not installed")
    for device in facts["cuda"]:
        table.add_row(device["name"], f"{size(device['memory'])}, compute capability {device['capability']}")
    if not facts["cuda"]:
        table.add_row("cuda", "no device")
    out.print(table)


def environment() -> dict:
    """Python, platform, CPUs, packages (None: not installed), CUDA devices, and the backend that `auto` takes."""
    import torch

    from t2r_kernels import resolve_backend

    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "backend": resolve_backend("auto", "cuda" if cuda else "cpu"),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": [
            {"name": device.name, "memory": device.total_memory, "capability": f"{device.major}.{device.minor}"}
            for device in cuda
        ],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
