"""Compile the kernels of a table entry for any NVIDIA GPU, without one: do they fit, and what do they take?

`python -m benchmarks.build_kernels` builds every entry of `configs.json` and prints shared memory and seconds;
`--architecture any --width 128 --num-slots 64` only those. It fails if one takes more than its GPU has.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t2r_kernels.triton import gradients, output, states, step
from t2r_kernels.triton.blocks import FUSED, Gating, View
from t2r_kernels.triton.configs import TABLE, Config
from t2r_kernels.triton.launch import block

# Compute capability to build for, and the shared memory that a block may take there, in bytes.
TARGETS = {"sm90": (90, 227 * 1024), "any": (86, 99 * 1024)}
KERNELS = {
    "states": states.chunk_states_kernel,
    "scan": states.scan_kernel,
    "output": output.output_kernel,
    "queries": gradients.query_gradients_kernel,
    "tokens": gradients.token_gradients_kernel,
    "through": gradients.state_gradients_kernel,
    "gates": gradients.gate_gradients_kernel,
    "step": step.step_kernel,
}


def build(entry: dict, architecture: str, kernel: str, banded: bool = False) -> int:
    """Compile one kernel as an entry of the table has it. Returns the shared memory of a block, in bytes."""
    config = Config(**{field.name: entry[field.name] for field in fields(Config)})
    half, M, D = entry["half"], entry["num_slots"], entry["width"]
    constants = {
        "GROUP": 4, "ROWS": 16, "M": M, "DK": D, "DV": D, "C": config.chunk, "BM": block(M, least=64 if half else 32),
        "BD": config.block_d, "BK": block(D), "BV": block(D), "GATE": FUSED.value, "PACKED": True, "HIDE": True,
        "KEEP": True, "REVERSE": True, "HAS_FIRST": True, "HAS_LAST": True, "LSE": True, "BANDED": banded,
        "OP": tl.bfloat16 if half else tl.float32, "PRECISION": "tf32" if half else "tf32x3",
    }  # fmt: skip
    options = dict(getattr(config, kernel))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    constants |= options
    function = KERNELS[kernel]
    types = {name: _type(name, half) for name in function.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    constexprs = {(i,): constants[name] for i, name in enumerate(function.arg_names) if name in constants}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=_divisible(signature))
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[architecture][0], 32), options=launch)
    return compiled.metadata.shared


def every_build(table: dict) -> Iterator[tuple[str, dict, str, bool]]:
    """Architecture, entry, kernel and `banded` of all that the table launches."""
    for architecture, entries in table.items():
        for entry in entries:
            for kernel in KERNELS:
                for banded in (False, True) if kernel in ("output", "queries", "tokens") else (False,):
                    yield architecture, entry, kernel, banded


def _type(name: str, half: bool):
    low = "*bf16" if half else "*fp32"
    views = {"slot": "*i32"} | dict.fromkeys(("lse", "d_lse", "rows", "columns", "sums", "through"), "*fp32")
    views |= dict.fromkeys(("q", "k", "v", "g", "s", "o", "do", "dq", "dk", "dv", "dg", "ds"), low)
    views |= dict.fromkeys(("weights", "d_logits", "written"), low)
    if name in views:
        return View(views[name], "i32", "i32", "i32")
    plain = {"gating": Gating(*["fp32"] * 4), "scale": "fp32", "states": low, "d_states": low}
    plain |= dict.fromkeys(("decay", "kept"), "*fp32")
    plain |= dict.fromkeys(("bands", "table", "bounds"), "*i32") | dict.fromkeys(("offsets", "positions"), "*i64")
    plain |= dict.fromkeys(("first_keys", "first_values", "last_keys", "last_values", "keys", "values"), "*fp32")
    return plain.get(name, "i32")


def _divisible(signature: dict) -> dict:
    """Pointers and strides are multiples of 16, as they nearly always are."""
    attributes = {}
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, View):
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(4)}
        elif isinstance(kind, str) and kind.startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return attributes


def main() -> None:
    """Build what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=TARGETS)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-slots", type=int)
    options = parser.parse_args()
    too_much = 0
    for architecture, entry, kernel, banded in every_build(json.loads(TABLE.read_text(encoding="utf-8"))):
        place = (architecture, entry["width"], entry["num_slots"])
        if any(want not in (None, is_) for want, is_ in zip(vars(options).values(), place, strict=True)):
            continue
        start = time.perf_counter()
        shared, limit = build(entry, architecture, kernel, banded), TARGETS[architecture][1]
        too_much += shared > limit
        name = f"{architecture} width {entry['width']} slots {entry['num_slots']} {'bf16' if entry['half'] else 'fp32'}"
        size = f"{shared / 1024:6.1f} KiB {time.perf_counter() - start:5.1f} s {'TOO MUCH' if shared > limit else ''}"
        print(f"{name:34s} {kernel:8s} {'banded' if banded else '':6s} {size}", flush=True)
    sys.exit(1 if too_much else 0)


if __name__ == "__main__":
    main()
