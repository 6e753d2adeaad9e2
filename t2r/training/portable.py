"""A run's adapters as something to hand on: PEFT's own files, and what makes the converted model of its base again."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import GenerationConfig

from t2r.evaluation.loading import locate
from t2r.model import T2RConfig, T2RForCausalLM, new_parameters, new_tensors
from t2r.training.folder import CONFIG, holds_result
from t2r.training.recipe import load_config
from t2r_conversion import open_source
from t2r_conversion.headers import one_line, read_headers, read_json
from t2r_conversion.plan import plan_for
from t2r_conversion.record import read_record
from t2r_conversion.source import Source
from t2r_conversion.tensors import fingerprint, read_tensors

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's
MODEL_CONFIG = "t2r_config.json"  # not config.json, beside which transformers would take the adapter for a model's
FITTED = "t2r_tensors.safetensors"
REPORTS = ("t2r_record.json", "report.md", "report.png")


def check_finished(run: Path) -> None:
    """Raise ValueError if a folder is not that of a finished `t2r train`."""
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run}: no {CONFIG}, so this is not the folder of a t2r train run")
    if not holds_result(run) or "training" not in read_record(run):
        raise ValueError(f"{run}: the run is not finished; go on with: t2r train {run / CONFIG} --resume")


def base_folder(run: Path) -> Path:
    """The folder of the model that a run has finetuned, downloaded if it must be."""
    location, _ = locate(load_config(run / CONFIG).model)
    return Path(location) if Path(location).is_dir() else Path(snapshot_download(location))


def pack(run: Path, base: str) -> dict[str, Path | bytes]:
    """A run's adapter: by name, files or their content.

    Args:
        run: folder of a finished `t2r train`.
        base: name on the Hub of the model that was converted.

    Raises:
        ValueError: the run is not finished, has trained all weights, or went on from another finetune.
    """
    check_finished(run)
    if not (run / ADAPTER[0]).is_file():
        raise ValueError(f"{run}: trained in full, so there are no adapters; t2r merge {run} -o OUT, and push that")
    folder = base_folder(run)
    if "training" in read_record(folder):
        raise ValueError(f"{run}: {folder} was finetuned before, which the adapters lack; t2r merge, and push that")
    config, headers = T2RConfig.from_pretrained(folder), read_headers(folder)
    added = _added(config, new_tensors(config))
    fitted = read_tensors(folder, headers, added - _added(config, new_parameters(config)))
    known = {"base": fingerprint(read_tensors(folder, headers, headers.keys() - added))}
    settings = read_json(run / ADAPTER[0], "run t2r train again") | {"base_model_name_or_path": base}
    return {
        ADAPTER[0]: json.dumps(settings, indent=2).encode(),
        ADAPTER[1]: run / ADAPTER[1],
        MODEL_CONFIG: config.to_json_string().encode(),
        FITTED: save(fitted, metadata=known),
        **{name: run / name for name in REPORTS if (run / name).is_file()},
    }


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, downloaded if it must be.

    Raises:
        ValueError: there is none, or it is not one that `pack` has made.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(adapter), allow_patterns=[*ADAPTER, MODEL_CONFIG, FITTED, *REPORTS]))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(f"{adapter}: neither a folder nor on the Hub ({one_line(error)})") from error
    missing = [name for name in (*ADAPTER, MODEL_CONFIG, FITTED) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{adapter}: no {', '.join(missing)}; give a run of t2r train, or what t2r push --adapter-only has made"
        )
    return folder


def from_adapter(base: str | Path | None, adapter: str | Path) -> T2RForCausalLM:
    """The finetuned model, of its base and what `t2r push --adapter-only` has made of the run, in the base's dtype.

    Args:
        base: the softmax model that was converted: a folder, a `.gguf` file or a Hub id; None for the one that the
            adapter names.
        adapter: a folder or a Hub id.

    Raises:
        ValueError: there is no such base or adapter, or it is the adapter of another base.
    """
    folder = adapter_folder(adapter)
    with open_source(base or base_name(folder)) as source:
        return finetuned(source, folder)


def finetuned(source: Source, folder: Path) -> T2RForCausalLM:
    """As `from_adapter`, of an opened base and the adapter's folder."""
    return merged(_converted(source, folder), folder)


def base_name(folder: Path) -> str:
    """The base that an adapter names."""
    return read_json(folder / ADAPTER[0], "download it again")["base_model_name_or_path"]


def merged(model: T2RForCausalLM, folder: Path) -> T2RForCausalLM:
    """A model with adapters and added parameters in it, in its own dtype."""
    dtype = model.dtype
    model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay fp32
        parameter.data = parameter.data.to(dtype)
    return model


def _converted(source: Source, folder: Path) -> T2RForCausalLM:
    """The converted model as it was before its finetune, but for the parameters that the adapter holds."""
    config = T2RConfig.from_json_file(folder / MODEL_CONFIG)
    dtype = config.dtype
    plan = plan_for(source, config)
    kept = read_tensors(source.folder, source.tensors, (tensor.name for tensor in plan.having("copied")))
    with safe_open(folder / FITTED, framework="pt") as file:
        known = file.metadata()["base"]
    if fingerprint(kept) != known:  # its dtype may have been changed on the way
        config.dtype, kept = dtype, {name: tensor.to(dtype) for name, tensor in kept.items()}
        if fingerprint(kept) != known:
            raise ValueError(f"{source.name}: not the model that {folder} was trained on, though of the same shape")
    new = {tensor.name: torch.zeros(tensor.shape) for tensor in plan.having("new")}
    state = kept | new | load_file(folder / FITTED)
    model = T2RForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype).eval()
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def _added(config: T2RConfig, names: dict) -> set[str]:
    """Full names of what all converted layers have of what one has."""
    return {f"model.layers.{i}.self_attn.{name}" for i in config.slot_layers for name in names}
