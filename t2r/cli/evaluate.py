"""`t2r eval`."""

from pathlib import Path
from typing import Annotated

import typer

from t2r.cli.console import out, print_json, progress_bar
from t2r.cli.options import Device, Dtype, Json, Model

Text = Annotated[Path, typer.Option("--text", metavar="FILE", help="A UTF-8 text to predict.")]
Window = Annotated[int, typer.Option("--window", help="Tokens in each of the non-overlapping windows.")]
Limit = Annotated[int, typer.Option("--limit", help="Windows to evaluate at most; 0 for all.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows at a time.")]

evaluation = typer.Typer(no_args_is_help=True, help="Measure a model.")


@evaluation.callback()
def _group() -> None:
    """Measure a model."""


@evaluation.command()
def ppl(
    model: Model,
    text: Text,
    teacher: Annotated[str | None, typer.Option(metavar="SRC", help="A model to compare with.")] = None,
    window: Window = 1024,
    limit: Limit = 32,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity on a text, by position in the window, beside a teacher's."""
    from t2r.evaluation import (
        cut_windows,
        load_model,
        load_tokenizer,
        locate,
        read_text,
        render,
        summarise,
        window_nlls,
    )

    if teacher is not None:
        locate(teacher)  # before the student's minutes are spent
    windows = cut_windows(load_tokenizer(model), read_text(text), window, limit or None)

    def evaluate(name: str, source: str):
        loaded = load_model(source, dtype=dtype, device=device)
        with progress_bar(name) as progress:
            return window_nlls(loaded, windows, batch_size=batch_size, progress=progress)

    # One model at a time in memory.
    student_nlls = evaluate("student", model)
    report = summarise(student_nlls, None if teacher is None else evaluate("teacher", teacher))
    if json:
        print_json(report.as_dict())
    else:
        out.print(render(report))


@evaluation.command()
def layers(
    model: Model,
    text: Text,
    keep: Annotated[int, typer.Option(help="Layers to choose.")] = 4,
    window: Window = 1024,
    limit: Limit = 8,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Which layers of a model, converted and not yet trained, had best keep softmax attention."""
    from rich.table import Table

    from t2r.evaluation import cut_windows, load_model, load_tokenizer, read_text, softmax_gains
    from t2r.model import T2RForCausalLM
    from t2r_conversion.record import read_record

    if "training" in read_record(model):
        raise ValueError(f"{model}: was trained, so its softmax attention is not its source's any more; convert anew")
    windows = cut_windows(load_tokenizer(model), read_text(text), window, limit or None)
    loaded = load_model(model, dtype=dtype, device=device)
    if not isinstance(loaded, T2RForCausalLM):
        raise ValueError(f"{model}: a {loaded.config.model_type} model; convert it first (t2r convert)")
    with progress_bar("layers") as progress:
        gains, chosen = softmax_gains(loaded, windows, keep, batch_size=batch_size, progress=progress)
    numbers = sorted(layer for layer, _ in chosen)
    if json:
        print_json({"gains": gains, "keep": numbers, "gain": chosen[-1][1] if chosen else 0.0})
        return
    table = Table("layer", "nats a token less", title="With softmax attention")
    for layer, gain in sorted(gains.items(), key=lambda item: -item[1]):
        table.add_row(str(layer), f"{gain:.4f}")
    out.print(table)
    if chosen:
        out.print(f"--keep-softmax {','.join(map(str, numbers))} gains {chosen[-1][1]:.4f} nats a token")
