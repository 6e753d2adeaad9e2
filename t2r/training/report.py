"""What a run came to, for people: a page and a picture, from its record alone."""

import math
from pathlib import Path

from t2r_conversion.record import read_record

BEFORE, AFTER, TEACHER = "#d95f02", "#1b6ca8", "#444444"
STAGE = {
    "steps": "steps",
    "tokens": "tokens",
    "sequence_length": "sequence length",
    "trains": "trains",
    "objective": "objective",
    "optimizer": "optimizer",
}
CONVERSION = (
    "source",
    "family",
    "start",
    "num_slots",
    "slots_by_layer",
    "num_sinks",
    "window",
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
    training = record["training"]
    lines += _table("Training", {key: value for key, value in training.items() if key != "stages"})
    lines += ["", *_stages(training["stages"])]
    lines += _gates([entry["gates"] for entry in record["history"] if "gates" in entry])
    if conversion:
        lines += ["", *_table("Conversion", {key: conversion[key] for key in CONVERSION if key in conversion})]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: dict) -> list[str]:
    cells = [f"| {key.replace('_', ' ')} | {_plain(value)} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells]


def _stages(stages: list[dict]) -> list[str]:
    lines = ["## Stages", "", f"| stage | {' | '.join(STAGE.values())} |", "|---" * (1 + len(STAGE)) + "|"]
    return lines + [f"| {s['stage']} | {' | '.join(_plain(s[key]) for key in STAGE)} |" for s in stages]


def _gates(gates: list[dict]) -> list[str]:
    if not gates:
        return []
    names = {"mean": "mean", "saturated": "within 0.001 of 0 or 1", "memory": "tokens that a slot keeps something"}
    rows = [f"| {title} | {gates[0][name]:.4g} | {gates[-1][name]:.4g} |" for name, title in names.items()]
    return ["", "## Forget gates", "", "| | first logged | last |", "|---|---|---|", *rows]


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
    during = [f"| {e['step']} | {e['student']:.2f} | {e['ratio']:.3f} |" for e in evaluation.get("during", ())]
    if during:
        lines += ["", "| step | student | ratio |", "|---|---|---|", *during]
    return [*lines, ""]


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _draw(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    evaluation, history = record.get("evaluation"), record["history"]
    aligned = [entry for entry in history if "alignment" in entry]
    figure = Figure(figsize=(11 if not aligned else 16, 4), layout="constrained")
    columns = 1 + bool(evaluation) + bool(aligned)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _draw_loss(axes[0], history)
    if aligned:
        _draw_alignment(axes[1], aligned)
    if evaluation:
        _draw_ratios(axes[-1], evaluation)
    figure.savefig(path, dpi=120)


def _draw_loss(axis, history: list[dict]) -> None:
    stages = dict.fromkeys(entry["stage"] for entry in history)
    for stage in stages:
        entries = [entry for entry in history if entry["stage"] == stage]
        steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
        axis.plot(steps, losses, color=AFTER, alpha=0.3)
        axis.plot(steps, _smooth(losses), color=AFTER)
        if len(stages) > 1:
            axis.axvline(steps[0] - 0.5, color=TEACHER, linewidth=0.5)
            axis.annotate(stage, (steps[0], 1.0), xycoords=("data", "axes fraction"), fontsize=8, va="bottom")
    unit = "nats per token" if len(stages) == 1 else "loss per token"
    axis.set(xlabel="step", ylabel=unit)
    axis.set_title("Training loss, and its running mean", pad=18 if len(stages) > 1 else None)
    if len(stages) > 1 and all(entry["loss"] > 0 for entry in history):
        axis.set_yscale("log")


def _draw_alignment(axis, entries: list[dict]) -> None:
    """Each layer's error, first layer to last as dark to bright."""
    from matplotlib import colormaps

    layers = len(entries[0]["alignment"])
    for i in range(layers):
        color = colormaps["viridis"](i / max(1, layers - 1))
        axis.plot([e["step"] for e in entries], [e["alignment"][i] for e in entries], color=color, linewidth=1)
    axis.set(xlabel="step", ylabel="relative squared error", yscale="log")
    axis.set_title(f"Alignment of {layers} layers, first (dark) to last")


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
