"""The `t2r` command: its subcommands, and what becomes of their errors."""

import logging
import os
import sys
import traceback
import warnings
from typing import Annotated

import typer
from typer.core import TyperGroup

import t2r
from t2r.cli.console import err
from t2r.cli.convert import convert
from t2r.cli.env import env
from t2r.cli.evaluate import evaluation
from t2r.cli.export import export
from t2r.cli.generate import generate
from t2r.cli.inspect import inspect
from t2r.cli.merge import merge
from t2r.cli.push import push
from t2r.cli.train import train


class Commands(TyperGroup):
    """Turns what users can mend into one line and exit code 2, and an interruption into exit code 130."""

    def invoke(self, ctx):
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `t2r … | head`: typer ends quietly
        except (ValueError, OSError) as error:
            if os.environ.get("T2R_TRACEBACK") == "1":
                traceback.print_exc()
            print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(
    name="t2r",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert)
app.command()(train)
app.command()(merge)
app.command()(export)
app.add_typer(evaluation, name="eval")
app.command()(generate)
app.command()(inspect)
app.command()(push)
app.command()(env)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"t2r {t2r.__version__}")
        raise typer.Exit


@app.callback()
def setup(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn pretrained softmax Transformers into recurrent models with constant memory.

    Errors are one line on stderr and exit code 2; T2R_TRACEBACK=1 shows where they come from.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries; users can do nothing about them
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if os.environ.get("RANK", "0") != "0":  # of several processes that would say the same, one does
        warnings.simplefilter("ignore")
    if not err.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(format="%(message)s")
    for package in ("t2r", "t2r_conversion", "t2r_kernels"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells what it does without


def main() -> None:
    """Entry point of the `t2r` command."""
    app(prog_name="t2r")


if __name__ == "__main__":
    main()
