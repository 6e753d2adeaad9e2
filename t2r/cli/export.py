"""`t2r export`."""

from pathlib import Path
from typing import Annotated

import typer

from t2r.cli.console import note, progress_bar
from t2r.cli.options import Output, Overwrite


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a T2R model of start paper.")],
    output: Output,
    to: Annotated[str, typer.Option("--to", metavar="fla", help="Whose model: flash-linear-attention's GSA.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a T2R model as one of another library."""
    from t2r_conversion import export_fla

    if to != "fla":
        raise ValueError(f"--to {to!r} is unknown; use fla")
    with progress_bar("exporting") as progress:
        export_fla(folder, output, overwrite=overwrite, progress=progress)
    note(f"written to {output}; load it with flash-linear-attention's GSAForCausalLM")
