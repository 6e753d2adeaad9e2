"""`t2r merge`."""

from typing import Annotated

import typer

from t2r.cli.console import note
from t2r.cli.options import Output, Overwrite


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finetune, or a pushed adapter.")],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="Of an adapter: the converted model, if not the one that it names.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a model of a finetune: its adapters merged into the weights."""
    import t2r.training

    t2r.training.merge(run, output, base=base, overwrite=overwrite)
    note(f"written to {output}")
