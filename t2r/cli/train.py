"""`t2r train`."""

from pathlib import Path
from typing import Annotated

import typer

from t2r.cli.console import note
from t2r.cli.options import Overwrite


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings that replace the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Finetune a converted model."""
    import t2r.training

    try:
        t2r.training.run(config, overrides or [], resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        note("interrupted; the same command with --resume goes on from the last checkpoint")
        raise
