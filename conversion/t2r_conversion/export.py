"""T2R models as folders of flash-linear-attention: other names and another configuration, the same bytes of weights."""

import json
import warnings
from pathlib import Path

from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion.fla import their_name
from t2r_conversion.fla_config import GSA, NORM_EPS, as_fla_config
from t2r_conversion.headers import INDEX, one_line, read_headers, read_json, write_index
from t2r_conversion.plan import check_tensors
from t2r_conversion.shards import Part, copy_tensors
from t2r_conversion.source import Source, copy_small_files, small_files
from t2r_conversion.writer import Progress, check_output, check_space, made_whole


def export_fla(
    folder: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write a T2R model as one that `GSAForCausalLM` of flash-linear-attention 0.6.0 loads.

    Args:
        folder: of a T2R model of start "paper".
        out: folder to write.
        overwrite: replace the model that is at `out`.
        progress: called with the bytes done and in all after each shard.

    Raises:
        ValueError: `folder` is no T2R model, flash-linear-attention has no such model, its files are damaged, or `out`
            cannot be written.
    """
    folder, out = Path(folder), Path(out).absolute()
    config = _read_config(folder)
    content = as_fla_config(config, str(folder / "config.json"))
    tensors = read_headers(folder)
    check_tensors(Source(folder.resolve().name, "folder", folder, GSA, config, tensors), config)
    check_output(out, folder, overwrite)
    _warn_of_epsilon(config, str(folder / "config.json"))
    kept = {name: tensors[name] for name in GSA.expected_tensors(config)}
    total = sum(tensor.bytes for tensor in kept.values())
    with made_whole(out) as partial:
        check_space(out, total + sum(file.stat().st_size for file in small_files(folder)))
        partial.mkdir(parents=True)
        done = 0
        for shard in sorted({tensor.shard for tensor in kept.values()}):
            here = [name for name, tensor in kept.items() if tensor.shard == shard]
            copy_tensors(partial / shard, [Part(folder / shard, name, their_name(name)) for name in here])
            done += sum(kept[name].bytes for name in here)
            if progress is not None:
                progress(done, total)
        write_index({their_name(name): t.shard for name, t in kept.items()}, partial / INDEX, total_size=total)
        copy_small_files(folder, partial)
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> T2RConfig:
    path = folder / "config.json"
    raw = read_json(path, "give the folder of a T2R model")
    if raw.get("model_type") != T2RConfig.model_type:
        raise ValueError(
            f"{path}: model_type {raw.get('model_type')!r}; only T2R models can be exported, so convert it"
        )
    try:
        config = T2RConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of fields that make no sense
        raise ValueError(f"{path}: {one_line(error)}") from error
    return config


def _warn_of_epsilon(config: T2RConfig, where: str) -> None:
    eps = config.rms_norm_eps if config.output_norm_eps is None else config.output_norm_eps
    if eps != NORM_EPS:
        warnings.warn(
            f"{where}: the norm before the output projection has epsilon {eps}, and {NORM_EPS} in "
            "flash-linear-attention whatever is configured, so logits will differ a little",
            stacklevel=3,
        )
