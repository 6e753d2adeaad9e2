"""`t2r inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from t2r.cli.console import out, print_json, size
from t2r.cli.options import Json

if TYPE_CHECKING:
    from t2r.hub import ModelFacts


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.")],
    json: Json = False,
) -> None:
    """What a model folder holds: layers, slots, parameters, memory, and its record. Reads no weights."""
    from t2r.hub import model_facts

    facts = model_facts(folder)
    if json:
        print_json(facts.as_dict())
    else:
        out.print(_model(facts), _memory(facts))
        if facts.record:
            out.print(_record(facts.record))


def _model(facts: "ModelFacts") -> Table:
    table = _rows(facts.folder)
    table.add_row("model type", facts.model_type)
    table.add_row("layers", ", ".join(f"{count} {kind}" for kind, count in facts.layers.items()))
    if facts.slots is not None:
        table.add_row("start", facts.start)
        table.add_row("slots", facts.slots_in_words + ("" if facts.sinks is None else f", {facts.sinks} of them sinks"))
    if facts.window is not None:
        table.add_row("softmax window", f"{facts.window} tokens")
    for name, value in facts.shape.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    table.add_row("parameters", f"{facts.parameters:,}")
    table.add_row("weights", f"{size(facts.weight_bytes)}, {facts.dtype}, {facts.shards} safetensors files")
    return table


def _memory(facts: "ModelFacts") -> Table:
    table = Table("tokens", title="Memory of one sequence")
    for column in ("state and cache", "all softmax"):
        table.add_column(column, justify="right")
    for tokens, count in facts.memory_bytes.items():
        table.add_row(f"{tokens:,}", size(count), size(facts.softmax_bytes[tokens]))
    return table


def _record(record: dict) -> Table:
    """What t2r_record.json says in single values; --json has the whole of it."""
    table = _rows("Record")
    for section, content in record.items():
        if not isinstance(content, dict):
            continue
        for name, value in content.items():
            if not isinstance(value, dict | list):
                table.add_row(f"{section} {name}".replace("_", " "), str(value))
    return table


def _rows(title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
