"""Table and pictures of docs/recovery.md, from the rows of its benchmark: `python -m benchmarks.recovery_report`."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ROWS = HERE / "results" / "recovery.json"
PAGE = HERE.parent / "docs" / "recovery.md"
PICTURES = HERE.parent / "docs" / "recovery"
BEGIN, END = "<!-- python -m benchmarks.recovery_report writes from here -->", "<!-- to here -->"
# Lines of the pictures: a label, and the runs it goes through. Each starts where its recipe does.
CURVES = {
    "64 slots": ("slots64_0", "slots64_4M"),
    "64 slots, routers as fitted": ("slots64_0", "frozen/slots64_4M", "slots64_20M"),
    "128 slots, routers as fitted": ("slots128_0", "slots128_20M"),
    "64 slots, 4 softmax layers, routers as fitted": ("softmax4_slots64",),
    "sliding window of equal state": ("control64_0", "control64_4M", "control64_20M"),
}
AGED = ("slots64_0", "slots64_4M", "slots128_20M")
LAST = ("slots64_0", "frozen/slots64_4M", "slots64_4M", "slots128_20M", "softmax4_slots64", "control64_20M")

Runs = dict[str, list[dict]]


def runs_of(rows: list[dict]) -> Runs:
    """Rows of runs by name, one a seed; those that follow from others are left out."""
    runs: Runs = defaultdict(list)
    for row in rows:
        if "recipe" in row:
            runs[row["name"]].append(row)
    return dict(sorted(runs.items(), key=lambda item: (_group(item[1][0]), item[0])))


def _group(row: dict) -> int:
    convert = row["recipe"]["convert"]
    return 2 if convert.get("keep_softmax") else 1 if convert.get("start") in ("window", "paper") else 0


def table(runs: Runs) -> str:
    """Every run in Markdown; where there are several seeds, their mean and standard deviation."""
    head = "| run | tokens | seeds | ratio | 0–63 | 512–1,023 | 4,096 | state | minutes |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for name, rows in runs.items():
        ratios, minutes = [row["ours"] for row in rows], [row["train_minutes"] for row in rows]
        spread = f" ± {statistics.pstdev(ratios):.3f}" if len(rows) > 1 else ""
        cells = (
            name, f"{rows[0]['tokens'] / 1e6:.1f}M", len(rows), f"{statistics.mean(ratios):.3f}{spread}",
            *(f"{statistics.mean(row['bands'][band] for row in rows):.3f}" for band in ("0-63", "512-1023")),
            f"{statistics.mean(row['ratio_4096'] for row in rows):.3f}", f"{rows[0]['state_bytes'] / 2**20:.1f} MiB",
            f"{statistics.mean(minutes):.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def ratio_by_tokens(runs: Runs) -> Figure:
    """Student/teacher perplexity against tokens trained on."""
    figure, axes = _axes("tokens (millions)", "student/teacher perplexity")
    for label, names in CURVES.items():
        points = [(row["tokens"] / 1e6, row["ours"]) for name in names for row in runs.get(name, ())[:1]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend()
    return figure


def ratio_by_position(runs: Runs) -> Figure:
    """Student/teacher perplexity by position in windows of 4,096 tokens."""
    figure, axes = _axes("position (tokens)", "student/teacher perplexity")
    for name in LAST:
        for row in runs.get(name, ())[:1]:
            bands = {tuple(map(int, band.split("-"))): ratio for band, ratio in row["bands_4096"].items()}
            middles = [((start + 1) * (end + 1)) ** 0.5 for start, end in bands]
            axes.plot(middles, bands.values(), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend()
    return figure


def memory_by_layer(runs: Runs) -> Figure:
    """How old what slots hold is, of each head."""
    figure, axes = _axes("layer", "mean age in slots (tokens)")
    shown = [name for name in AGED if any(row.get("memory") for row in runs.get(name, ()))]
    colours = colormaps["viridis"].resampled(max(2, len(shown)))
    for i, name in enumerate(shown):
        heads = runs[name][0]["memory"]
        points = [(layer + 0.12 * i, age) for layer, ages in enumerate(heads) for age in ages]
        axes.scatter(*zip(*points, strict=True), s=9, color=colours(i), label=name)
    axes.set_ylim(bottom=0)
    if shown:
        axes.legend()
    return figure


def _axes(x: str, y: str):
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def write(rows: Path, page: Path, pictures: Path) -> None:
    """Put the table between the page's two marks, and write the pictures."""
    runs = runs_of(json.loads(rows.read_text(encoding="utf-8"))["rows"])
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(runs)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = {"tokens": ratio_by_tokens, "positions": ratio_by_position, "memory": memory_by_layer}
    for name, draw in drawn.items():
        draw(runs).savefig(pictures / f"{name}.png", dpi=110)


if __name__ == "__main__":
    write(ROWS, PAGE, PICTURES)
