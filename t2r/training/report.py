"""What a run came to, for people: a page and a picture, from its record alone."""

import math
from pathlib import Path

from t2r_conversion.record import read_record

BEFORE, AFTER, TEACHER = "#d95f02", "#1b6ca8", "#444444"
CONVERSION = (
    "source",
    "family",
    "start",
    "num_slots",
    "num_sinks",
    "gate_write_logit",
    "gate_keep_logit",
    "layer_types",
)


def write_report(folder: str | Path) -> Path:
    """Write `report.md` and `report.png` into a run's folder, from its `t2r_record.json`.

    Raises:
        ValueError: the folder has no record of a training.
    """
    folder = Path(folder)
    record = read_record(folder)
    if "training" not in record:
        raise ValueError(f"{folder}: no record of a training; run t2r train first")
    _draw(record, folder / "report.png")
    page = folder / "report.md"
    page.write_text(_page(record), encoding="utf-8")
    return page


def _page(record: dict) -> str:
    conversion = record.get("conversion", {})
    lines = [
        f"# Finetune of {conversion.get('source', 'a converted model')}",
        "",
        "![Loss and perplexity](report.png)",
        "",
    ]
    if "evaluation" in record:
        lines += _evaluation(record["evaluation"])
    lines += _table("Training", record["training"])
    if conversion:
        lines += ["", *_table("Conversion", {key: conversion[key] for key in CONVERSION if key in conversion})]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: dict) -> list[str]:
    cells = [f"| {key.replace('_', ' ')} | {_plain(value)} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells]


def _evaluation(evaluation: dict) -> list[str]:
    before, after = evaluation["before"], evaluation["after"]
    rows = [(f"{b['from']}–{b['to']}", b, a) for b, a in zip(before["bands"], after["bands"], strict=True)] + [
        ("**all**", before, after)
    ]
    lines = [
        f"Perplexity on `{evaluation['text']}`: {after['windows']} windows of {evaluation['window']:,} tokens, by the "
        "position that a token is predicted from.",
        "",
        "| position | teacher | student at step 0 | ratio | student after | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, b, a in rows:
        lines.append(
            f"| {name} | {b['teacher']:.2f} | {b['student']:.2f} | {b['ratio']:.3f} "
            f"| {a['student']:.2f} | {a['ratio']:.3f} |"
        )
    return [*lines, ""]


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _draw(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    evaluation = record.get("evaluation")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2 if evaluation else 1, squeeze=False)[0]
    _draw_loss(axes[0], record["history"])
    if evaluation:
        _draw_ratios(axes[1], evaluation)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_loss(axis, history: list[dict]) -> None:
    steps, losses = [e["step"] for e in history], [e["loss"] for e in history]
    axis.plot(steps, losses, color=AFTER, alpha=0.3)
    axis.plot(steps, _smooth(losses), color=AFTER)
    axis.set(xlabel="step", ylabel="nats per token", title="Training loss, and its running mean")


def _smooth(values: list[float]) -> list[float]:
    """Mean of each value and up to a fifth of all before it."""
    width = max(1, len(values) // 5)
    parts = [values[max(0, i - width) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _draw_ratios(axis, evaluation: dict) -> None:
    for label, stage, color in (("at step 0", "before", BEFORE), ("after", "after", AFTER)):
        curve = evaluation[f"{stage}_curve"]
        middle = [(band["from"] + band["to"]) / 2 for band in curve]
        ratio = [math.exp(band["student"] - band["teacher"]) for band in curve]
        axis.plot(middle, ratio, label=f"student {label}", color=color)
    axis.axhline(1, label="teacher", color=TEACHER, linewidth=1)
    axis.set(xlabel="position in the window", ylabel="perplexity / teacher's", title=evaluation["text"])
    axis.legend(frameon=False)
