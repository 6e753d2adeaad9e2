"""Choose the kernels' launch options on this GPU: `python -m benchmarks.tune_operator` rewrites them in `configs.json`.

For each width, number of slots and dtype of the table, every kernel is timed by itself with each candidate that
compiles and fits, and the fastest is kept. Chunk length and tile widths stay as they are.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources

from benchmarks.build_kernels import KERNELS
from benchmarks.operator import Shape, inputs, milliseconds
from t2r_kernels.triton import launch
from t2r_kernels.triton.blocks import Gating
from t2r_kernels.triton.configs import TABLE, Config, architecture_of
from t2r_kernels.triton.launcher import run


class Recorded(launch.Call):
    """A call that remembers its launches."""

    def run(self, name: str, *tensors) -> None:
        """Run and remember."""
        self.done = [*getattr(self, "done", ()), *self.launches]
        super().run(name, *tensors)


def candidates(kernel: str, half: bool) -> Iterator[dict[str, int]]:
    """Launch options to try for a kernel. Tiles of slots have rows of at least 128 bytes (see the kernels' README)."""
    least = 64 if half else 32
    own = {"scan": ("BLOCK", (256, 512, 1024)), "step": ("BS", (16, 32, 64)), "gates": ("BS", (32, 64))}
    own |= {"states": ("BS", (least, 2 * least)), "through": ("maxnreg", (None, 128))}
    name, values = own.get(kernel, ("HEADS", (1, 2, 4)))
    for value, warps, stages in itertools.product(values, (4, 8), (1, 2) if name == "HEADS" else (1,)):
        yield ({} if value is None else {name: value}) | {"num_warps": warps, "num_stages": stages}


class Trial:
    """Inputs of a table entry's shape, and the time of one kernel on them as configured."""

    def __init__(self, entry: dict):
        dtype, sizes = torch.bfloat16 if entry["half"] else torch.float32, (entry["width"], entry["num_slots"])
        self.whole, self.token = (self._inputs(sizes, B, T, dtype) for B, T in ((4, 2048), (256, 1)))
        self.state = [torch.zeros(256, 8, entry["num_slots"], entry["width"], device="cuda") for _ in range(2)]

    def _inputs(self, sizes: tuple[int, int], B: int, T: int, dtype: torch.dtype) -> tuple:
        q, k, v, logits, gate = inputs(Shape("", 32, 8, *sizes), B, T)
        tensors = (x.detach().to(dtype) for x in (q, k, v, logits))
        return (
            *tensors,
            None,
            gate.slot,
            None,
            torch.zeros(B, dtype=torch.long, device="cuda"),
            0.1,
            Gating(7.0, 12.0, 1.0, 1.0),
        )

    def launches(self, config: Config, kernel: str) -> list:
        """The launches of a kernel in a forward and a backward pass that ran with it; not those for many bands."""
        call = Recorded(*self.whole, config)
        launch.backward(call, torch.ones_like(launch.forward(call, None, None)), None, None)
        return [x for x in call.done if x.kernel is KERNELS[kernel] and not x.arguments.get("BANDED")]

    def step(self, config: Config) -> None:
        """A decoded token."""
        *tensors, _, positions, scale, gating = self.token
        launch.step(*tensors, positions, *self.state, scale, gating, config)

    def compile(self, config: Config, kernel: str) -> None:
        """All that `milliseconds` runs."""
        self.step(config) if kernel == "step" else self.launches(config, kernel)

    def milliseconds(self, config: Config, kernel: str) -> float:
        """What a kernel's launches take."""
        if kernel == "step":
            return milliseconds(lambda _: self.step(config), [None])
        mine = self.launches(config, kernel)
        return milliseconds(lambda _: run(mine, ("tune", kernel, config), torch.device("cuda")), [None])


def fits(entry: dict, kernel: str, options: dict) -> bool:
    """Whether the GPU takes a candidate. What it compiles is then in Triton's cache."""
    try:
        Trial(entry).compile(config_of(entry | {kernel: options}), kernel)
    except OutOfResources:
        return False
    return True


def config_of(entry: dict) -> Config:
    """An entry as the kernels take it."""
    return Config(**{field.name: entry[field.name] for field in fields(Config)})


def tune(entry: dict, pool: Executor, console: Console) -> dict:
    """An entry with the fastest options for each kernel. The candidates are compiled by the pool's processes."""
    trial = Trial(entry)
    tasks = [(kernel, options) for kernel in KERNELS for options in candidates(kernel, entry["half"])]
    fit = list(pool.map(fits, *zip(*((entry, *task) for task in tasks), strict=True)))
    tried = [(kernel, entry[kernel]) for kernel in KERNELS] + list(itertools.compress(tasks, fit))
    trials = [(kernel, config_of(entry | {kernel: options})) for kernel, options in tried]
    for kernel in KERNELS:
        took = [(trial.milliseconds(other, kernel), getattr(other, kernel)) for name, other in trials if name == kernel]
        best = min(took, key=lambda x: x[0])
        entry = entry | {kernel: best[1]}
        place = f"width {entry['width']} slots {entry['num_slots']} {'bf16' if entry['half'] else 'fp32'}"
        console.print(f"{place} {kernel}: {took[0][0]:.4f} → {best[0]:.4f} ms with {best[1]}")
    return entry


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
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"))
    for i, entry in enumerate(entries):
        if options.width in (None, entry["width"]) and options.num_slots in (None, entry["num_slots"]):
            entries[i] = tune(entry, pool, console)
            write(table | {architecture: entries}, options.out)


if __name__ == "__main__":
    main()
