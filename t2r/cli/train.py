"""`t2r train`."""

from pathlib import Path
from typing import Annotated

import typer

from t2r.cli.console import note, out, print_json
from t2r.cli.options import Overwrite


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings that replace the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show stages, memory and disk, and do nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON, and nothing else.")] = False,
) -> None:
    """Train a converted model: align, distill, finetune."""
    import t2r.training

    if json and not dry_run:
        raise ValueError("--json goes with --dry-run; what a run came to is in its folder's t2r_record.json")
    if dry_run:
        plan = t2r.training.dry_run(config, overrides or [])
        print_json(plan.as_dict()) if json else out.print(t2r.training.render(plan))
        return
    try:
        t2r.training.run(config, overrides or [], resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        note("interrupted; the same command with --resume goes on from the last checkpoint")
        raise
    except t2r.training.Terminated:
        note("asked to stop, and saved a checkpoint; the same command with --resume goes on from it")
        raise
    t2r.training.leave_the_others()
