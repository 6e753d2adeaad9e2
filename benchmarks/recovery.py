"""How much of its teacher a converted model recovers: SmolLM2-135M-Instruct, by recipe.

    python -m benchmarks.recovery RECIPE.yaml ... --data DIR [--seed 0 --seed 1]

A recipe has two parts: `convert`, the arguments of `t2r_conversion.convert`, and `train`, a recipe of `t2r train`
without model and output; without it, the model is measured as it is converted. DIR holds `corpus.jsonl.gz`, to train
on, and `wikitext2-valid.txt`, to report on. A recipe's `data.files` may name `corpus.jsonl`, which is all of the
corpus and the default, or its sources one by one, `sources/NAME.jsonl`. Each run has a process of its own, as many at
a time as there are GPUs, and its row in `recovery.json`, which a later run of the same recipe and seed replaces.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.record import commit, hardware, write_results

RESULTS, RECIPES = (Path(__file__).resolve().parent / name for name in ("results", "recipes"))
MODEL = Path(".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
# Tokens of a window, and how many windows: all predictions are on the reported text's beginning.
WINDOWS = {1024: 64, 4096: 16}
AGED = 8  # windows that show how old what slots hold is
AT_ONCE = 2**14  # tokens of one forward pass on a GPU
EXCERPT, EXCERPTS = 6000, 8  # characters of a document that routers are fitted to, and how many of each source


def prepare(data: Path, work: Path) -> None:
    """Unpack the corpus into DIR/corpus.jsonl and, by source, DIR/sources; excerpts of all its sources alike into
    DIR/calibrate.jsonl."""
    (work / "sources").mkdir(parents=True, exist_ok=True)
    packed_corpus, seen = data / "corpus.jsonl.gz", work / "corpus.size"
    about = f"{packed_corpus.stat().st_size} {EXCERPT} {EXCERPTS} by source" if packed_corpus.is_file() else None
    if (work / "calibrate.jsonl").is_file() and (about is None or (seen.is_file() and seen.read_text() == about)):
        return
    with gzip.open(packed_corpus, "rb") as packed, (work / "corpus.jsonl").open("wb") as file:
        shutil.copyfileobj(packed, file)
    with (work / "corpus.jsonl").open(encoding="utf-8") as lines:
        rows, by_source = list(map(json.loads, lines)), defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(json.dumps(row) + "\n")
    for name, of_source in by_source.items():
        (work / "sources" / f"{name}.jsonl").write_text("".join(of_source), encoding="utf-8")
    found = excerpts(rows)
    lines = (json.dumps({"text": text}) + "\n" for text in found)
    (work / "calibrate.jsonl").write_text("".join(lines), encoding="utf-8")
    seen.write_text(about)


def excerpts(rows: Iterable[dict]) -> list[str]:
    """As many from each source's documents, from anywhere in them, in an order of a seed's."""
    generator, sources = random.Random(0), defaultdict(list)
    for row in rows:
        if len(row["text"]) > EXCERPT:
            sources[row["source"]].append(row["text"])
    chosen = [text for texts in sources.values() for text in generator.sample(texts, min(EXCERPTS, len(texts)))]
    generator.shuffle(chosen)
    starts = (generator.randrange(len(text) - EXCERPT) for text in chosen)
    return [text[start : start + EXCERPT] for text, start in zip(chosen, starts, strict=True)]


def name_of(recipe: Path) -> str:
    """Of a recipe's rows: its file's, after the folder's for one that is inside a folder of ours: "slots64_4M/even"."""
    path = recipe.resolve().with_suffix("")
    return path.relative_to(RECIPES).as_posix() if path.is_relative_to(RECIPES) else path.name


def files_of(train: dict, work: Path) -> list[dict]:
    """What a recipe learns from, as `t2r train` takes it: paths are in `work`."""
    files = train.get("data", {}).get("files", ["corpus.jsonl"])
    entries = ({"path": entry} if isinstance(entry, str) else entry for entry in files)
    return [entry | {"path": str(work / entry["path"])} for entry in entries]


def nlls(model, tokenizer, text: str, share: float) -> dict[int, torch.Tensor]:
    """Negative log-likelihoods on the reported text, by length of windows; of a share of the windows."""
    from t2r.evaluation import cut_windows, window_nlls

    windows = {length: cut_windows(tokenizer, text, length, max(1, int(n * share))) for length, n in WINDOWS.items()}
    at_once = AT_ONCE if torch.cuda.is_available() else 0
    return {length: window_nlls(model, part, batch_size=max(1, at_once // length)) for length, part in windows.items()}


@torch.no_grad()
def memory(model, windows: torch.Tensor) -> list[list[float]] | None:
    """How long ago, in tokens, what slots but sinks hold at a window's end came: mean of each routed layer's heads."""
    from t2r.model.heads import in_order

    ages, sinks = [], getattr(model.config, "num_sinks", 0)
    for window in windows.to(model.device):
        cache = model(window[None], use_cache=True, logits_to_keep=1).past_key_values
        ages.append([])
        for number in getattr(model.config, "slot_layers", ()):
            held = [slots.held.positions[:, None, :, sinks:] for slots in cache.layers[number].groups if slots.held]
            if held:
                since = in_order([x.float().mean(-1) for x in held], model.config.head_groups(number))  # [1, 1, H]
                ages[-1].append(len(window) - 1 - since[0, 0])
    layers = [torch.stack(of_layer).mean(0).tolist() for of_layer in zip(*ages, strict=True)]
    return [[round(age, 1) for age in heads] for heads in layers] or None


def measured(model: Path, text: str, share: float, asked: int) -> dict:
    """`nlls` on the reported text, `memory` there, and `recall` of as many questions at each distance."""
    from benchmarks.recall import DISTANCES, questions, recall
    from t2r.evaluation import cut_windows, load_model, load_tokenizer

    network, tokenizer = load_model(model, dtype="float32"), load_tokenizer(model)
    recalled = {
        distance: recall(network, questions(tokenizer, text, distance, asked)) for distance in DISTANCES if asked
    }
    aged = memory(network, cut_windows(tokenizer, text, min(WINDOWS), AGED))
    return {"nlls": nlls(network, tokenizer, text, share), "memory": aged, "recall": recalled}


def teacher_measured(options: argparse.Namespace) -> dict:
    """The teacher's, measured once."""
    text = (options.data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    key = hashlib.sha256(f"{options.model.resolve()} {text}".encode()).hexdigest()[:12]
    path = options.work / f"teacher-{key}-{options.share}-{options.recall}.pt"
    if not path.is_file():
        torch.save(measured(options.model, text, options.share, options.recall), path)
    return torch.load(path)


def run(path: Path, seed: int, options: argparse.Namespace) -> dict:
    """Convert, train and measure; returns the row."""
    import t2r_conversion
    from t2r.evaluation import summarise
    from t2r.training import merge
    from t2r.training import run as train

    recipe, work, name = yaml.safe_load(path.read_text(encoding="utf-8")), options.work, name_of(path)
    folder, began = work / f"{name.replace('/', '-')}-{seed}", time.perf_counter()
    start = dict(recipe.get("convert", {}))
    if start.get("start") == "routed":
        start |= {"calibrate": work / "calibrate.jsonl"}
    plan = t2r_conversion.convert(options.model, folder / "converted", overwrite=True, **start)
    converted, record, model = time.perf_counter() - began, {}, folder / "converted"
    if "train" in recipe:
        content = {"model": str(model), "output": str(folder / "run"), "seed": seed, **recipe["train"]}
        content["data"] = {**content.get("data", {}), "files": files_of(recipe["train"], work)}
        (folder / "train.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        record = train(folder / "train.yaml", options.set, overwrite=True)
        model = folder / "merged"
        merge(folder / "run", model, overwrite=True)
    text = (options.data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    student, teacher = measured(model, text, options.share, options.recall), teacher_measured(options)
    reports = {length: summarise(student["nlls"][length], teacher["nlls"][length]) for length in WINDOWS}
    training = record.get("training", {})
    main = reports[1024]
    return {
        "name": name,
        "unit": "ratio",
        "ours": round(main.overall.ratio, 4),
        "ratio_4096": round(reports[4096].overall.ratio, 4),
        "perplexity": round(main.overall.student, 3),
        "teacher": round(main.overall.teacher, 3),
        "bands": {f"{band.start}-{band.end}": round(band.ratio, 4) for band in main.bands},
        "bands_4096": {f"{band.start}-{band.end}": round(band.ratio, 4) for band in reports[4096].bands},
        "windows": main.windows,
        "seed": seed,
        "tokens": training.get("tokens", 0),
        "convert_minutes": round(converted / 60, 2),
        "train_minutes": round(training.get("seconds", 0) / 60, 2),
        "peak_mib": training.get("peak_memory_mib"),
        "state_bytes": sum(plan.memory([max(WINDOWS)])[0][key] for key in ("state", "kept_cache")),
        "memory": student["memory"],
        **({"recall": student["recall"], "recall_teacher": teacher["recall"]} if options.recall else {}),
        "commit": commit(),
        "hardware": hardware(),
        "overrides": options.set,
        "recipe": recipe,
    }


def derived(rows: list[dict]) -> list[dict]:
    """What follows from the rows of runs: how short contexts fare, and what slots are better by than a window."""
    first = {row["name"]: row for row in reversed(rows)}
    found = []
    for tokens in ("20M", "4M"):
        slots, control = first.get(f"slots64_{tokens}"), first.get(f"control64_{tokens}")
        if slots and not found:
            found.append({"name": "short_context", "unit": "ratio", "ours": slots["bands"]["0-63"]})
        if slots and control:
            margin = 1 - slots["bands"]["512-1023"] / control["bands"]["512-1023"]
            return [*found, {"name": "control_margin_512", "unit": "share", "ours": round(margin, 4)}]
    return found


def in_processes(jobs: list[tuple[Path, int]], options: argparse.Namespace) -> Iterator[dict]:
    """The rows of all jobs as they end, each run in a process of its own, on one GPU if there are any."""
    gpus: Queue[str] = Queue()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(max(1, torch.cuda.device_count()))))
    for gpu in visible.split(",") * options.jobs:
        gpus.put(gpu)

    def one(job: tuple[Path, int]) -> dict | None:
        path, seed = job
        gpu, log = gpus.get(), options.work / f"{name_of(path).replace('/', '-')}-{seed}.log"
        command = [sys.executable, "-m", "benchmarks.recovery", str(path), "--one", "--seed", str(seed)]
        for name in ("model", "data", "work", "share", "recall"):
            command += [f"--{name}", getattr(options, name)]
        command += [word for override in options.set for word in ("--set", override)]
        try:
            with log.open("w") as errors:
                env, words = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}, [str(word) for word in command]
                done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        finally:
            gpus.put(gpu)
        if done.returncode:
            print(f"{name_of(path)}, seed {seed}: failed, see {log}", file=sys.stderr)
            return None
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        for done in as_completed([pool.submit(one, job) for job in jobs]):
            if done.result():
                yield done.result()


def main() -> None:
    """Run recipes, and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--share", type=float, default=1.0, help="of the reported windows, to try things out")
    parser.add_argument("--recall", type=int, default=0, metavar="N", help="ask N questions at each distance as well")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for `t2r train`")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seeds = options.seed or [0]
    if options.one:
        print(json.dumps(run(options.recipes[0], seeds[0], options)))
        return
    prepare(options.data, options.work)
    teacher_measured(options)
    kept, new = options.out / "recovery.json", []
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"] if kept.is_file() else []
    rows = [row for row in rows if "recipe" in row]
    for row in in_processes([(path, seed) for path in options.recipes for seed in seeds], options):
        new.append(row)
        rows = [old for old in rows if (old["name"], old.get("seed")) != (row["name"], row["seed"])] + [row]
        write_results("recovery", rows + derived(rows), options.out)
    table = Table("recipe", "seed", "tokens", "ratio", *(new[0]["bands"] if new else ()), "4,096")
    for row in new:
        figures = [f"{x:.3f}" for x in (row["ours"], *row["bands"].values(), row["ratio_4096"])]
        table.add_row(row["name"], str(row["seed"]), f"{row['tokens']:,}", *figures)
    Console().print(table)
    print(kept, file=sys.stderr)


if __name__ == "__main__":
    main()
