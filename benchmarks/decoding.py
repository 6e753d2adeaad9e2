"""Milliseconds of a decoded token: SmolLM2-135M with 64 slots by need, 64 in each head, and as it came.

`python -m benchmarks.decoding --data DIR` converts it (DIR as for `benchmarks.recovery`) and writes `decoding.json`:
what a step of transformers' `generate` takes, in bf16, for one sequence and for many, with CUDA graphs and without.
"""

import argparse
import gc
import time
from pathlib import Path

import torch

import t2r_conversion
from benchmarks.record import write_results
from benchmarks.recovery import MODEL, RESULTS, prepare
from t2r.evaluation import load_model

SHAPES, NEW = ((1, 512), (1, 8192), (64, 512)), 128  # sequences and tokens of their prompts; tokens generated
TRIES = 2  # of which the faster counts
WAYS = {"ours": None, "even": "even"}  # `slots_by_layer`


@torch.no_grad()
def step_ms(model, batch: int, prompt: int) -> float:
    """Milliseconds of a step, without the prompt's."""
    ids = torch.randint(1000, 40000, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)

    def seconds(new: int) -> float:
        began = time.perf_counter()
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(NEW)  # kernels are compiled
    whole, first = (min(seconds(new) for _ in range(TRIES)) for new in (NEW, 1))
    return round((whole - first) / (NEW - 1) * 1e3, 3)


def main() -> None:
    """Convert, and time each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare(options.data, options.work)
    models = {"softmax": options.model}
    for name, slots in WAYS.items():
        models[name] = options.work / f"decoding-{name}"
        fitted = {"start": "routed", "num_slots": 64, "calibrate": options.work / "calibrate.jsonl"}
        t2r_conversion.convert(options.model, models[name], overwrite=True, slots_by_layer=slots, **fitted)
    rows = {shape: {"name": "{} x {}".format(*shape), "unit": "ms/token"} for shape in SHAPES}
    for name, path in models.items():
        model = load_model(path, dtype="bfloat16")
        for shape, row in rows.items():
            row[name] = step_ms(model, *shape)
            if name in WAYS:
                model.model.cuda_graphs = False
                row["no_graphs" if name == "ours" else f"{name}_no_graphs"] = step_ms(model, *shape)
                model.model.cuda_graphs = True
            print(row, flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(write_results("decoding", list(rows.values()), options.out))


if __name__ == "__main__":
    main()
