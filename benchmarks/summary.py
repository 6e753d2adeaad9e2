"""All measured figures beside those to reach: `python -m benchmarks.summary`."""

import json
from pathlib import Path

import tomllib
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
# Of a run rather than of the figure it came to.
ABOUT = ("windows", "seed", "tokens", "step", "convert_minutes", "train_minutes", "peak_mib", "state_bytes")


def judge(row: dict, target: dict) -> str:
    """ "aim", "required" or "missed": the best that a row's figure reaches; "" without a target."""
    value, sign = row["ours"] / row.get(target.get("of"), 1), -1 if target.get("more") else 1
    for level in ("aim", "required"):
        if level in target and sign * value <= sign * target[level]:
            return level
    return "missed" if "required" in target else ""


def main() -> None:
    """Print every row of `benchmarks/results/`."""
    targets = tomllib.loads((HERE / "targets.toml").read_text(encoding="utf-8"))
    console = Console()
    console.width = max(console.width, 120)
    for path in sorted((HERE / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = targets.get(content["benchmark"], {})
        table = Table(title=f"{content['benchmark']} · {content['hardware']} · {content['date']}", title_justify="left")
        rows, peers = content["rows"], dict.fromkeys(name for row in content["rows"] for name in row)
        peers = [name for name in peers if all(isinstance(row.get(name, 0), int | float) for row in rows)]
        peers = [name for name in peers if name not in ABOUT]
        for column in ("row", "unit", *peers, "required", "aim", "reached"):
            left = column in ("row", "unit", "reached")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for row in rows:
            target = wanted.get(row["name"], {})
            numbers = [row.get(peer) for peer in peers] + [target.get("required"), target.get("aim")]
            cells = ("" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in numbers)
            table.add_row(row["name"], row["unit"], *cells, judge(row, target))
        console.print(table)


if __name__ == "__main__":
    main()
