"""Whether checkpoints come through conversion as what they were.

    python -m benchmarks.checkpoints [--out DIR]

It needs a GPU and flash-linear-attention (`pip install flash-linear-attention`), whose models are made at random,
converted and compared with what they become, and the other way round.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import write_results
from t2r.model import T2RForCausalLM
from t2r_conversion import convert, export_fla

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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows = [fla_row(name, dtype) for name, dtype in (("", torch.float32), ("_bf16", torch.bfloat16))]
    for row in rows:
        print(f"{row['name']:<28}" + "  ".join(f"{name} {row[name]:.2e}" for name in ("ours", "largest", "fla")))
    print(write_results("checkpoints", rows, options.out))


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
