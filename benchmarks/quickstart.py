"""The figures of `make quickstart`, from the record that it leaves in runs/quickstart.

python -m benchmarks.quickstart [--run DIR] [--out DIR]
"""

import argparse
from pathlib import Path

from benchmarks.record import write_results
from t2r_conversion.record import read_record


def rows_of(record: dict) -> list[dict]:
    """Perplexities by band, memory of a sequence, loss and speed, each by a name of its own."""
    evaluation, memory = record["evaluation"], record["conversion"]["memory"]
    rows = []
    for stage in ("before", "after"):
        report = evaluation[stage]
        bands = {f"{band['from']}_{band['to']}": band for band in report["bands"]} | {"all": report}
        for name, band in bands.items():
            perplexity = {"unit": "perplexity", "ours": band["student"], "teacher": band["teacher"]}
            rows.append({"name": f"{stage}_{name}", **perplexity, "ratio": band["ratio"]})
    rows += [{"name": f"kv_cache_{m['tokens']}_mib", "unit": "MiB", "ours": m["source_cache"] / 2**20} for m in memory]
    rows.append({"name": "state_mib", "unit": "MiB", "ours": memory[0]["state"] / 2**20})
    rows += [{"name": f"loss_{step['step']}", "unit": "nats", "ours": step["loss"]} for step in record["history"]]
    for name, unit in (("steps", ""), ("tokens", ""), ("seconds", "s"), ("peak_memory_mib", "MiB")):
        rows.append({"name": f"finetune_{name}", "unit": unit, "ours": record["training"][name]})
    return rows


def main() -> None:
    """Write benchmarks/results/quickstart.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart/finetuned"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    print(write_results("quickstart", rows_of(read_record(options.run)), options.out))


if __name__ == "__main__":
    main()
