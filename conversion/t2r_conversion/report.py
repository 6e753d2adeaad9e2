"""A plan for the eye."""

from rich.console import Group
from rich.table import Table

from t2r.model.configuration_t2r import HYBRID_ATTENTION, SLOT_ATTENTION
from t2r_conversion.plan import Plan


def render(plan: Plan) -> Group:
    """The plan as rich tables: what becomes of the tensors, the layers, and memory against the KV cache."""
    tables = [_tensors(plan), _layers(plan)]
    return Group(*tables if plan.source.family.recurrent else [*tables, _memory(plan)])


def _tensors(plan: Plan) -> Table:
    table = _table(f"{plan.source.name} ({plan.source.family.model_type})", "tensors", "parameters", "bytes")
    table.columns[0].header = "action"
    for action, total in plan.totals().items():
        table.add_row(action, *(f"{total[column]:,}" for column in ("tensors", "parameters", "bytes")))
    return table


def _layers(plan: Plan) -> Table:
    config = plan.config
    table = _table("Layers", "count", "which")
    slots = f"Gated Slot Attention, {config.start} start, {config.slots_in_words} slots"
    for kind in dict.fromkeys(config.layer_types):
        numbers = [number for number, other in enumerate(config.layer_types) if other == kind]
        name = slots if kind in SLOT_ATTENTION else kind
        beside = f" beside a window of {config.hybrid_window} tokens" if kind == HYBRID_ATTENTION else ""
        table.add_row(name + beside, str(len(numbers)), _ranges(numbers))
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of one sequence", "state + kept KV cache", "source's KV cache", "ratio")
    table.columns[0].header = "tokens"
    for row in plan.memory():
        ours, theirs = row["state"] + row["kept_cache"], row["source_cache"]
        table.add_row(f"{row['tokens']:,}", _size(ours), _size(theirs), f"{ours / theirs:.3f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table("", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as "0-3, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
