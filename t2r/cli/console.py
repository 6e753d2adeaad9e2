"""Where output goes: results to stdout, notes and progress to stderr."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

out = Console()
err = Console(stderr=True)


def print_json(content: dict) -> None:
    """JSON on stdout, as it is: not wrapped, not coloured."""
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """A line on stderr."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal; what this yields moves it: amount done, amount in all."""
    if not err.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield move


def size(count: int) -> str:
    """Bytes for people, in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:,.0f} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"
