"""What a run came to, for people: a page and a picture, from its record alone."""

import math
from pathlib import Path

from t2r_conversion.record import read_record

STUDENT_BEFORE, STUDENT_AFTER, TEACHER = "#d95f02", "#1b6ca8", "#444444"


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
    training, conversion = record["training"], record.get("conversion", {})
    lines = [
        f"# Finetune of {conversion.get('source', 'a converted model')}",
        "",
        "![Loss and perplexity](report.png)",
        "",
    ]
    evaluation = record.get("evaluation")
    if evaluation:
        lines += _evaluation(evaluation)
    lines += ["## Training", "", "| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {_plain(value)} |" for key, value in training.items()]
    if conversion:
        lines += ["", "## Conversion", "", "| | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {_plain(value)} |" for key, value in conversion.items()]
    return "\n".join(lines) + "\n"


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

    history, evaluation = record["history"], record.get("evaluation")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2 if evaluation else 1, squeeze=False)[0]
    axes[0].plot([e["step"] for e in history], [e["loss"] for e in history], color=STUDENT_AFTER)
    axes[0].set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    if evaluation:
        before, after = evaluation["before_curve"], evaluation["after_curve"]
        middle = [(band["from"] + band["to"]) / 2 for band in before]
        for label, curve, key, color in (
            ("teacher", before, "teacher", TEACHER),
            ("student at step 0", before, "student", STUDENT_BEFORE),
            ("student after", after, "student", STUDENT_AFTER),
        ):
            axes[1].plot(middle, [math.exp(band[key]) for band in curve], label=label, color=color)
        axes[1].set(xlabel="position in the window", ylabel="perplexity", yscale="log", title=evaluation["text"])
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
