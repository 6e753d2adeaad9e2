"""Convert pretrained softmax Transformers into T2R models: plan from headers, then write one shard at a time."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion.calibrate import Calibration, calibration_of, check_text
from t2r_conversion.export import export_fla
from t2r_conversion.families import FAMILIES, Family
from t2r_conversion.headers import SourceTensor
from t2r_conversion.plan import Plan, PlannedTensor, plan_conversion
from t2r_conversion.report import render
from t2r_conversion.routers import Fit, fit_routers
from t2r_conversion.slots import can_differ, levels, slots_by_need
from t2r_conversion.source import Source, open_source, read_source
from t2r_conversion.stream import where_it_fits
from t2r_conversion.tensors import read_tensors
from t2r_conversion.writer import Progress, can_link, check_output, check_space, write

__all__ = [
    "FAMILIES",
    "Family",
    "Plan",
    "PlannedTensor",
    "Source",
    "SourceTensor",
    "convert",
    "export_fla",
    "open_source",
    "plan_conversion",
    "read_source",
    "render",
    "write",
]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    start: str | None = None,
    num_slots: int | None = None,
    num_sinks: int = 4,
    slots_by_layer: str | Iterable[int | list[int]] | None = None,
    keep_softmax: Iterable[int] = (),
    gate_write: float = T2RConfig.gate_write_logit,
    gate_keep: float = T2RConfig.gate_keep_logit,
    window: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    calibrate: str | Path | None = None,
    calibration_tokens: int = 32768,
    hard_link: bool = False,
    source_format: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    calibrating: Progress | None = None,
) -> Plan:
    """Convert a model.

    Args:
        source: a local Hugging Face folder, a Hub id, or a `.gguf` file.
        out: folder to write.
        start: see `plan_conversion`.
        num_slots: see `plan_conversion`.
        slots_by_layer: "even" for `num_slots` in each; "by need" for more in key/value heads that need them and fewer
            in others, no more in all, as the text that routers are fitted to shows; or the slots of each layer, or of
            each head of a layer. None for "by need" with the routed start, "even" with others.
        num_sinks: see `plan_conversion`.
        keep_softmax: see `plan_conversion`.
        gate_write: see `plan_conversion`.
        gate_keep: see `plan_conversion`.
        window: see `plan_conversion`.
        dtype: see `plan_conversion`.
        max_shard_size: see `write`.
        calibrate: routed start: a text that the routers are fitted to; None for `REFERENCE` in `calibrate`.
        calibration_tokens: of that text, at most.
        hard_link: share the files of untouched shards with the source instead of copying them; nobody must write to
            either afterwards.
        source_format: "fla" if the source has to be flash-linear-attention's; None for whatever it is.
        overwrite: replace the model that is at `out`.
        dry_run: plan only; nothing is written, and no weights are downloaded or unpacked.
        progress: called with the bytes done and in all after each shard.
        calibrating: called with the layers done and in all after each, while routers are fitted.

    Returns:
        The plan that was, or would be, carried out.

    Raises:
        ValueError: see `read_source`, `plan_conversion` and `write`; or the source is not what `source_format` says.
    """
    named = slots_by_layer if isinstance(slots_by_layer, str) else None
    if named not in (None, "even", "by need"):
        raise ValueError(f"slots_by_layer {named!r} is unknown; use 'by need', 'even', or the slots of each layer")
    options = {
        "start": start,
        "num_slots": num_slots,
        "slots_by_layer": None if named or slots_by_layer is None else list(slots_by_layer),
        "num_sinks": num_sinks,
        "keep_softmax": tuple(keep_softmax),
        "gate_write": gate_write,
        "gate_keep": gate_keep,
        "window": window,
        "dtype": dtype,
    }
    out = Path(out).absolute()
    headers = read_source(source)
    if source_format is not None:
        _check_format(headers, source_format)
    plan = plan_conversion(headers, **options)
    routed = plan.config.start == "routed"
    by_need = named == "by need" or (routed and slots_by_layer is None)
    if not routed and (calibrate is not None or by_need):
        what = "slots_by_layer: by need" if calibrate is None else "calibrate"
        raise ValueError(f"{what} has no effect with start {plan.config.start!r}; use start 'routed'")
    if calibrate is not None:
        check_text(calibrate)
    if dry_run:
        return plan
    check_output(out, headers.folder, overwrite)
    if not (hard_link and can_link(headers, out)):
        check_space(out, sum(tensor.bytes for tensor in plan.having("copied", "new")))
    by_need = by_need and can_differ(plan.config)
    most = levels(plan.config)[-1] if by_need else plan.config.most_slots
    about = calibrate, calibration_tokens, most
    text = calibration_of(*about, headers.folder, calibrating) if routed and headers.kind != "gguf" else None
    with open_source(headers, scratch=out.with_name(f".{out.name}.unpacked")) as opened:
        plan, fit = plan_conversion(opened, **options), None
        if routed:
            text = text or calibration_of(*about, opened.folder, calibrating)
            plan, fit = _fitted(plan, options, text, by_need)
        more = {} if fit is None else {"fitted": fit.tensors, "about": {"calibration": text.as_dict() | fit.as_dict()}}
        more |= {"hard_link": hard_link, "max_shard_size": max_shard_size}
        write(plan, out, overwrite=overwrite, progress=progress, **more)
    return plan


def _fitted(plan: Plan, options: dict, text: Calibration, by_need: bool) -> tuple[Plan, Fit]:
    """Routers fitted to a text, and the plan with the slots of each head by need."""
    source, done, passes = plan.source, 0, 1 + by_need

    def read(name: str) -> Tensor:
        return read_tensors(source.folder, source.tensors, [name])[name]

    def progress(layers: int, total: int) -> None:
        if text.progress is not None:
            text.progress(done * total + layers, passes * total)

    def on_device(work: Callable) -> Any:
        return where_it_fits(lambda device: work(plan.config, read, text.windows, device, progress))

    if by_need:
        slots = on_device(slots_by_need)
        if any(of_layer != plan.config.num_slots for of_layer in slots):
            known = {"num_slots": plan.config.num_slots, "slots_by_layer": slots}
            plan = plan_conversion(source, **options | known)
        done = 1
    return plan, on_device(fit_routers)


def _check_format(source: Source, source_format: str) -> None:
    if source_format != "fla":
        raise ValueError(f"source format {source_format!r} is unknown; use 'fla', or none for what the source is")
    if not source.family.recurrent:
        raise ValueError(
            f"{source.name}: a {source.family.model_type} model, none of flash-linear-attention; convert it without "
            "naming a source format"
        )
