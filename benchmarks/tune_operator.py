"""Choose the kernels' launch options on this GPU: `python -m benchmarks.tune_operator` rewrites them in `configs.json`.

For each width, number of slots and dtype of the table, every kernel is timed by itself with each candidate that
compiles and fits, and the fastest is kept. Chunk length and tile widths stay as they are.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources

from benchmarks.operator import Shape, inputs, milliseconds
from t2r_kernels.triton import launch
from t2r_kernels.triton.blocks import Gating
from t2r_kernels.triton.configs import TABLE, Config, architecture_of

WARPS, STAGES = (4, 8), (1, 2)


def candidates(kernel: str, half: bool) -> Iterator[dict[str, int]]:
    """Launch options to try for a kernel. Tiles of slots have rows of at least 128 bytes (see the kernels' README)."""
    names = {"scan": ("BLOCK", (256, 512, 1024)), "step": ("BS", (16, 32, 64))}
    names |= dict.fromkeys(("states", "gates"), ("BS", (64, 128) if half else (32, 64)))
    name, values = names.get(kernel, ("HEADS", (1, 2, 4)))
    for value, warps, stages in itertools.product(values, WARPS, STAGES):
        yield {name: value, "num_warps": warps, "num_stages": stages}


def timings(entry: dict, config: Config, kernel: str) -> float:
    """Milliseconds of what a kernel is part of (a forward pass, a backward pass or a decoded token) as configured."""
    dtype = torch.bfloat16 if entry["half"] else torch.float32
    tokens = (256, 1) if kernel == "step" else (4, 2048)
    q, k, v, logits, gate = inputs(Shape("", 32, 8, entry["width"], entry["num_slots"]), *tokens)
    q, k, v, logits = (x.detach().to(dtype) for x in (q, k, v, logits))
    gating = Gating(*gate[1:], 1.0)
    launch.config_for = lambda *_, **__: config
    if kernel == "step":
        state = [torch.zeros(256, 8, entry["num_slots"], entry["width"], device="cuda") for _ in range(2)]
        return milliseconds(lambda _: launch.step(q, k, v, logits, None, gate.slot, None, *state, 0.1, gating), [0, 0])
    call = launch.Call(q, k, v, logits, None, gate.slot, None, None, 0.1, gating)
    if kernel in ("states", "scan", "output"):
        return milliseconds(lambda _: launch.forward(call, None, None), [0, 0])
    return milliseconds(lambda _: launch.backward(call, torch.ones_like(q), None, None), [0, 0])


def tune(entry: dict, console: Console) -> dict:
    """An entry with the fastest options for each kernel, one after another."""
    config = Config(**{field.name: entry[field.name] for field in fields(Config)})
    for kernel in ("states", "scan", "output", "queries", "tokens", "gates", "step"):
        best = (timings(entry, config, kernel), getattr(config, kernel))
        for options in candidates(kernel, entry["half"]):
            try:
                took = timings(entry, replace(config, **{kernel: options}), kernel)
            except OutOfResources:
                continue
            best = min(best, (took, options), key=lambda x: x[0])
        config = replace(config, **{kernel: best[1]})
        console.print(f"width {entry['width']} slots {entry['num_slots']} {kernel}: {best[0]:.4f} ms with {best[1]}")
    return entry | {field.name: getattr(config, field.name) for field in fields(Config)}


def write(table: dict, path: Path) -> None:
    """The table, an entry a line."""
    parts = []
    for architecture, entries in table.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        parts.append(f"  {json.dumps(architecture)}: [\n{lines}\n  ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Tune the entries that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, help="only entries of this width")
    parser.add_argument("--num-slots", type=int, help="only entries of this number of slots")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    architecture, console = architecture_of(torch.device("cuda")), Console()
    entries = table.get(architecture, table["any"])
    for i, entry in enumerate(entries):
        if options.width in (None, entry["width"]) and options.num_slots in (None, entry["num_slots"]):
            entries[i] = tune(entry, console)
            write(table | {architecture: entries}, options.out)


if __name__ == "__main__":
    main()
