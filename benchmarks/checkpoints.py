"""Checkpoints: how fast and in how much memory they are converted, how damage is met, and what comes through.

    python -m benchmarks.checkpoints [--only convert] [--only fuzz] [--only fla] [--work DIR] [--out DIR]

`convert` needs 30 GB of disk for a checkpoint of Mistral-7B's shape and its copy; `fuzz` converts 10,000 damaged
checkpoints; `fla` needs a GPU and flash-linear-attention (`pip install flash-linear-attention`), whose models are made
at random, converted and compared with what they become, and the other way round. Rows of what is left out stay.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.mistral_7b import make_source
from benchmarks.record import commit, hardware, write_results
from t2r.model import T2RForCausalLM
from t2r_conversion import convert, export_fla

CONVERT = """
import sys, time
from pathlib import Path
import t2r_conversion
began = time.perf_counter()
t2r_conversion.convert(sys.argv[1], sys.argv[2], start="window", hard_link=sys.argv[3] == "link")
seconds = time.perf_counter() - began
status = Path("/proc/self/status").read_text().splitlines()
print(seconds, next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""
FUZZ_EACH, FUZZ_KINDS = 1250, 8  # damaged inputs of each kind of file and family, see tests/conversion/test_fuzz.py
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "num_slots": 64,
}
LENGTHS = (64, 500)  # tokens: flash-linear-attention goes up to 64 one by one, and by chunks from there


def main() -> None:
    """Measure, print and write `checkpoints.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, action="append")
    parser.add_argument("--work", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    about = {"commit": commit(), "hardware": hardware()}
    new = [row | about for name in options.only or ROWS for row in ROWS[name](options.work)]
    kept = options.out / "checkpoints.json"
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"] if kept.is_file() else []
    names = {row["name"] for row in new}
    for row in new:
        print(f"{row['name']:<28}" + "  ".join(f"{k} {x:.3g}" for k, x in row.items() if isinstance(x, int | float)))
    print(write_results("checkpoints", [row for row in rows if row["name"] not in names] + new, options.out))


def convert_rows(work: Path) -> list[dict]:
    """Seconds and memory that the conversion of a 7B takes with hard links, and its rate beside `cp`'s where it copies.

    Copies are written to the disk before the clock stops.
    """
    source, out = work.absolute() / "source", work.absolute() / "out"
    if not (source / "model.safetensors.index.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        make_source(source)
    linked, copied, plain = [], [], []
    for _ in range(3):
        linked.append(_converted(source, out, "link"))
        began = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
        os.sync()
        plain.append(time.perf_counter() - began)
        shutil.rmtree(out)
        copied.append(_converted(source, out, "copy")[0])
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    rates = {"convert_gb_s": size / 1e9 / min(copied), "cp_gb_s": size / 1e9 / min(plain)}
    return [
        {"name": "convert_7b_link_s", "unit": "s", "ours": min(linked)[0], "gb": size / 1e9},
        {"name": "convert_7b_peak_mib", "unit": "MiB", "ours": max(peak for _, peak in linked)},
        {"name": "convert_7b_copy_share", "unit": "share", "ours": min(plain) / min(copied), **rates},
    ]


def _converted(source: Path, out: Path, how: str) -> tuple[float, float]:
    """Seconds and peak MiB of a conversion, in a process of its own; the result is removed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CONVERT, source, out, how], stdout=subprocess.PIPE, check=True)
    seconds, peak = map(float, done.stdout.split())
    started = time.perf_counter() - began - seconds  # interpreter and imports
    os.sync()
    total = time.perf_counter() - began - started
    shutil.rmtree(out)
    return total, peak


def fuzz_rows(work: Path) -> list[dict]:  # noqa: ARG001
    """How many damaged checkpoints have been met with an error of ours, or none."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "tests/conversion/test_fuzz.py"]
    subprocess.run(command, env=os.environ | {"T2R_FUZZ": str(FUZZ_EACH)}, stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - began
    return [{"name": "fuzz_inputs", "unit": "inputs", "ours": FUZZ_EACH * FUZZ_KINDS, "seconds": round(seconds)}]


def fla_rows(work: Path) -> list[dict]:  # noqa: ARG001
    """`fla_row` in both dtypes."""
    return [fla_row(suffix, dtype) for suffix, dtype in (("", torch.float32), ("_bf16", torch.bfloat16))]


ROWS = {"convert": convert_rows, "fuzz": fuzz_rows, "fla": fla_rows}


def fla_row(suffix: str, dtype: torch.dtype) -> dict:
    """The worst of both ways and all lengths, as `fla_roundtrip` measures them; beside it, what rounding makes of
    flash-linear-attention alone."""
    with tempfile.TemporaryDirectory() as folder:
        errors = fla_roundtrip(Path(folder), dtype)
    rounding = max(mean for name, (mean, _) in errors.items() if name.startswith("rounding"))
    mean, largest = (max(e[i] for name, e in errors.items() if not name.startswith("rounding")) for i in range(2))
    return {"name": f"fla_roundtrip_error{suffix}", "unit": "σ", "ours": mean, "largest": largest, "fla": rounding}


@torch.no_grad()
def fla_roundtrip(
    folder: Path, dtype: torch.dtype, *, shape: dict[str, int] = SHAPE, device: str = "cuda"
) -> dict[str, tuple[float, float]]:
    """Random models of flash-linear-attention beside what conversion makes of them, and of T2R beside their exports.

    Args:
        folder: where they are saved; must exist.
        dtype: of weights and arithmetic.
        shape: fields of a `GSAConfig`.
        device: of both models.

    Returns:
        By way and length ("in/64", "out/64"): root mean square and largest magnitude of the differences between
        logits, in standard deviations of the logits. "rounding/64": of flash-linear-attention's from its own in fp32.
    """
    # Triton would round fp32 operands to tf32; t2r's kernels do not, flash-linear-attention's leave it to Triton.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    with untuned():
        from fla.models import GSAConfig, GSAForCausalLM

    torch.manual_seed(0)
    to = {"dtype": dtype, "device": device}
    source = scatter_norms(GSAForCausalLM(GSAConfig(**shape))).to(**to).eval()
    source.save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted", source_format="fla")
    converted = T2RForCausalLM.from_pretrained(folder / "converted", dtype=dtype).to(device).eval()
    exact = GSAForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).to(device).eval()
    vocab_size = shape["vocab_size"]
    ways = {"in": compare(source, converted, vocab_size), "rounding": compare(exact, source, vocab_size)}

    other = scatter_norms(T2RForCausalLM(converted.config)).to(**to).eval()
    other.save_pretrained(folder / "other")
    export_fla(folder / "other", folder / "exported")
    exported = GSAForCausalLM.from_pretrained(folder / "exported", dtype=dtype).to(device).eval()
    ways["out"] = compare(exported, other, vocab_size)
    return {f"{way}/{length}": error for way, errors in ways.items() for length, error in errors.items()}


@contextmanager
def untuned() -> Iterator[None]:
    """Triton kernels that are defined meanwhile run with the first of their configurations, without the minutes of
    tuning that speed would be worth."""
    from triton.runtime.autotuner import Autotuner

    prepare = Autotuner.__init__

    def prepare_first(self, fn, arg_names, configs, *args, **options):
        prepare(self, fn, arg_names, configs[:1], *args, **options)

    Autotuner.__init__ = prepare_first
    try:
        yield
    finally:
        Autotuner.__init__ = prepare


def scatter_norms(model: nn.Module) -> nn.Module:
    """The model with norms' weights that are not all 1, which would hide a mix-up."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(mean=1.0, std=0.1)
    return model


def compare(theirs: nn.Module, ours: nn.Module, vocab_size: int) -> dict[int, tuple[float, float]]:
    """Differences between two models' logits on random tokens, for each length."""
    errors = {}
    for length in LENGTHS:
        ids = torch.randint(0, vocab_size, (2, length), device=theirs.device)
        errors[length] = difference(*(model(ids, use_cache=False).logits.double() for model in (ours, theirs)))
    return errors


def difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude of a difference, in standard deviations of what is expected."""
    error = (actual - expected) / expected.std()
    return error.square().mean().sqrt().item(), error.abs().max().item()


if __name__ == "__main__":
    main()
