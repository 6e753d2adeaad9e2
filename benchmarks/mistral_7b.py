"""The whole way at the size it is for: a checkpoint of Mistral-7B's shape, converted, finetuned and decoded on a GPU.

    python -m benchmarks.mistral_7b [--work DIR] [--out DIR] [--steps N]

The weights are random, so it measures time and memory and says nothing of quality. It needs about 30 GB of disk.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.record import write_results

CONFIG = """
model: {work}/converted
output: {work}/run
data: {{files: [{work}/text.jsonl], sequence_length: 2048}}
lora: {{r: 16}}
gradient_checkpointing: true
steps: {steps}
save_every: 1000
log_every: 1
"""

CONVERT = """
import sys, time
from pathlib import Path
import t2r_conversion
began = time.perf_counter()
t2r_conversion.convert(sys.argv[1], sys.argv[2], start="window", overwrite=True)
seconds = time.perf_counter() - began
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
print(seconds, peak)
"""

DECODE = """
import json, sys
from t2r.evaluation import generate_stream, load_model, load_tokenizer
model = load_model(sys.argv[1])
stats = [generate_stream(model, load_tokenizer(sys.argv[1]), "w7 " * 500, 100, chat=False) for _ in range(2)][-1]
print(json.dumps({"tokens_per_second": stats.tokens_per_second, "state_bytes": stats.state_bytes}))
"""


def make_source(folder: Path, **sizes: int) -> None:
    """A Mistral-7B of random bf16 weights in shards, with a tokenizer of made-up words; `sizes` make it another."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MistralConfig, PreTrainedTokenizerFast

    from t2r.model import T2RConfig
    from t2r_conversion import FAMILIES

    config = MistralConfig(
        sliding_window=None,
        dtype="bfloat16",
        architectures=["MistralForCausalLM"],
        max_position_embeddings=32768,
        **sizes,
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 32000)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)

    family = FAMILIES["mistral"]
    names = list(family.expected_tensors(T2RConfig(**family.config_values(config))).items())
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    weight_map = {}
    for first in range(0, len(names), 37):
        shard = f"model-{first:05d}.safetensors"
        tensors = {name: _values(name, shape, generator) for name, shape in names[first : first + 37]}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _values(name: str, shape: tuple[int, ...], generator):
    import torch

    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator, device=generator.device) * 0.02).bfloat16().cpu()


def make_text(path: Path) -> None:
    """Documents of 1,000 made-up words, enough for 16 rows."""
    documents = (" ".join(f"w{2 + (i * j * 7919) % 31998}" for j in range(1, 1001)) for i in range(1, 35))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def run(*words: object) -> str:
    """Standard output of a Python process."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _both(key: str, ours: dict, softmax: dict, divisor: int = 1) -> dict[str, float]:
    """A figure of the converted model, and of the one that it was made of."""
    return {"ours": ours[key] / divisor, "softmax": softmax[key] / divisor}


def main() -> None:
    """Make, convert, finetune, decode; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/mistral_7b"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    work = options.work.absolute()
    source, converted, config = work / "source", work / "converted", work / "config.yaml"
    if not (source / "model.safetensors.index.json").exists():
        source.mkdir(parents=True, exist_ok=True)
        make_source(source)
    make_text(work / "text.jsonl")
    config.write_text(CONFIG.format(work=work, steps=options.steps))

    convert_seconds, convert_peak = map(float, run("-c", CONVERT, source, converted).split())
    run("-m", "t2r.cli.main", "train", config, "--overwrite")
    record = json.loads((work / "run" / "t2r_record.json").read_text())
    speeds = sorted(step["tokens_per_second"] for step in record["history"][2:])
    decoded, softmax = (json.loads(run("-c", DECODE, folder)) for folder in (converted, source))
    rows = [
        {"name": "convert_s", "unit": "s", "ours": convert_seconds},
        {"name": "convert_peak_mib", "unit": "MiB", "ours": convert_peak},
        {"name": "finetune_tokens_per_s", "unit": "tokens/s", "ours": speeds[len(speeds) // 2]},
        {"name": "finetune_peak_mib", "unit": "MiB", "ours": record["training"]["peak_memory_mib"]},
        {"name": "decode_tokens_per_s", "unit": "tokens/s"} | _both("tokens_per_second", decoded, softmax),
        {"name": "state_mib", "unit": "MiB"} | _both("state_bytes", decoded, softmax, 2**20),
    ]
    for row in rows:
        print(f"{row['name']:<24}{row['ours']:>12,.1f} {row['unit']}")
    print(write_results("mistral_7b", rows, options.out))


if __name__ == "__main__":
    main()
