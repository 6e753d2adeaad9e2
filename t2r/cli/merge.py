"""`t2r merge`."""

from pathlib import Path
from typing import Annotated

import typer

from t2r.cli.console import note
from t2r.cli.options import Output, Overwrite


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finetune.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Make a model of a finetune: its adapters merged into the weights."""
    import t2r.training

    t2r.training.merge(run, output, overwrite=overwrite)
    note(f"written to {output}")
