"""Convert pretrained softmax Transformers into T2R models: plan from headers, then write one shard at a time."""

from collections.abc import Iterable
from pathlib import Path

from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion.calibrate import calibration_of, check_text
from t2r_conversion.export import export_fla
from t2r_conversion.families import FAMILIES, Family
from t2r_conversion.headers import SourceTensor
from t2r_conversion.plan import Plan, PlannedTensor, plan_conversion
from t2r_conversion.report import render
from t2r_conversion.source import Source, open_source, read_source
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
        start: see `plan_conversion`, as for the next seven.
        num_slots: see `plan_conversion`.
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
    options = {
        "start": start,
        "num_slots": num_slots,
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
    if calibrate is not None:
        if not routed:
            raise ValueError(f"calibrate has no effect with start {plan.config.start!r}; use start 'routed'")
        check_text(calibrate)
    if dry_run:
        return plan
    check_output(out, headers.folder, overwrite)
    if not (hard_link and can_link(headers, out)):
        check_space(out, sum(tensor.bytes for tensor in plan.having("copied", "new")))
    about = calibrate, calibration_tokens, plan.config.num_slots
    fit = calibration_of(*about, headers.folder, calibrating) if routed and headers.kind != "gguf" else None
    with open_source(headers, scratch=out.with_name(f".{out.name}.unpacked")) as opened:
        plan = plan_conversion(opened, **options)
        if routed and fit is None:
            fit = calibration_of(*about, opened.folder, calibrating)
        options = {"calibration": fit, "hard_link": hard_link, "max_shard_size": max_shard_size}
        write(plan, out, overwrite=overwrite, progress=progress, **options)
    return plan


def _check_format(source: Source, source_format: str) -> None:
    if source_format != "fla":
        raise ValueError(f"source format {source_format!r} is unknown; use 'fla', or none for what the source is")
    if not source.family.recurrent:
        raise ValueError(
            f"{source.name}: a {source.family.model_type} model, none of flash-linear-attention; convert it without "
            "naming a source format"
        )
