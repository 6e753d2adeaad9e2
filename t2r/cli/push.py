"""`t2r push`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from t2r.cli.console import note, out, size


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, or with --adapter-only a finetune's.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; created if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Create it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it is not there.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Title of the commit.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Upload what a finetune has learnt, and name the model it is for.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="REPO", help="Of an adapter: that model's name on the Hub, if not recorded.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, show the card, touch nothing.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with a card made from its record."""
    from t2r.hub import push as push_folder

    options = {"private": private, "dry_run": dry_run, "revision": revision, "commit_message": message}
    pushed = push_folder(folder, repo, adapter_only=adapter_only, base=base, **options)
    if not dry_run:
        print(pushed.url)
        return
    table = Table("file", title=f"Files for {repo}")
    table.add_column("size", justify="right")
    for name, count in pushed.files:
        table.add_row(name, size(count))
    out.print(table)
    print(pushed.card)
    note("dry run: nothing is written or uploaded")
