"""Recipes: a training configuration from a YAML file and `key=value` overrides, checked, and its stages."""

from dataclasses import fields
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2r.training.config import LossConfig, OptimConfig, StageConfig, TrainConfig
from t2r.training.documents import sources_of

# What a stage is: the weights of its loss.
STAGES = {
    "align": {"align": 1.0, "distill": 0.0, "cross_entropy": 0.0},
    "distill": {"align": 0.0, "distill": 1.0, "cross_entropy": 0.0},
    "finetune": {"align": 0.0, "distill": 0.0, "cross_entropy": 1.0},
}
CHOICES = {"stage": tuple(STAGES), "trains": ("lora", "gates", "full"), "loss.direction": ("forward", "reverse")}


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` or `section.key=value`, stronger than the file; `stages.0.key=value` for a stage.

    Raises:
        ValueError: the file is missing or no YAML mapping, a key is unknown (the error suggests one), a value has
            the wrong type or is out of range, or a mandatory one is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    wrong = [o for o in overrides or [] if "=" not in o]
    if wrong:
        raise ValueError(f"override {wrong[0]!r} is not of the form key=value")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
        for override in overrides or []:
            key, _, value = override.partition("=")
            value = OmegaConf.from_dotlist([f"value={value}"])["value"]
            OmegaConf.update(merged, key, value)
        config: TrainConfig = OmegaConf.to_object(merged)
        stages = stages_of(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from error
    try:
        _check(config)
        for i, stage in enumerate(stages):
            _check_stage(stage, f"stages.{i}." if config.stages else "")
            if stage.trains != "gates" and (stage.trains == "full") != (config.trains == "full"):
                raise ValueError(f"stages.{i}.trains: {stage.trains} does not go with {config.trains} at the top")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def stages_of(config: TrainConfig) -> list[StageConfig]:
    """A run's stages, complete: each with what it says itself, what its kind means, and the rest from the top."""
    top = OmegaConf.structured(config)
    names = [field.name for field in fields(StageConfig) if field.name in top]
    common = OmegaConf.create({name: top[name] for name in names} | {"sequence_length": top.data.sequence_length})
    if not config.stages:
        kind = "align" if config.loss.align else "distill" if config.loss.distill else "finetune"
        return [OmegaConf.to_object(OmegaConf.merge(StageConfig, common, {"stage": kind}))]
    stages = []
    for entry in map(OmegaConf.create, config.stages):
        length = {"steps": None, "tokens": None} if "steps" in entry or "tokens" in entry else {}
        kind = {"loss": STAGES.get(entry.get("stage", "distill"), {})}
        stages.append(OmegaConf.to_object(OmegaConf.merge(StageConfig, common, length, kind, entry)))
    return stages


def dtype_of(config: TrainConfig, on_cuda: bool) -> str:
    """The dtype of the frozen weights: what the recipe says, or what suits the device."""
    return ("bfloat16" if on_cuda else "float32") if config.dtype == "auto" else config.dtype


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def as_dict(config: TrainConfig | StageConfig | LossConfig | OptimConfig) -> dict:
    """A configuration as plain dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def _one_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's message with the key's full name, without its lines about types."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return message if not key or f"'{key}'" in message else f"{message} (at {key})"


def _check(config: TrainConfig) -> None:
    _at_least(1, save_every=config.save_every, save_limit=config.save_limit, log_every=config.log_every)
    _at_least(1, **{"lora.r": config.lora.r, "eval.every": config.eval.every})
    sources_of(config.data)
    if config.stages and (config.loss.align, config.loss.distill, config.loss.cross_entropy) != (0, 1, 0):
        raise ValueError("the weights of loss (align, distill, cross_entropy) belong into the stages that they are for")
    if config.eval.every and not config.eval.text:
        raise ValueError("eval.every has no effect without eval.text")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {config.dtype!r}")
    if config.teacher_bits not in (None, 8, 4):
        raise ValueError(f"teacher_bits must be 8 or 4, or unset, got {config.teacher_bits}")
    if config.teacher_bits and config.trains != "full":
        raise ValueError("teacher_bits has no effect: the teacher is the student's own weights unless trains: full")


def _check_stage(stage: StageConfig, at: str) -> None:
    loss, optim = stage.loss, stage.optim
    for name, wanted in CHOICES.items():
        value = OmegaConf.select(OmegaConf.structured(stage), name)
        if value not in wanted:
            raise ValueError(f"{at}{name} must be one of {', '.join(wanted)}, got {value!r}")
    if (stage.steps is None) == (stage.tokens is None):
        raise ValueError(f"{at}steps or {at}tokens: give one of them")
    counts = {name: getattr(stage, name) for name in ("steps", "tokens", "batch_size", "gradient_accumulation")}
    _at_least(1, **{f"{at}{name}": value for name, value in counts.items()} | {f"{at}loss.top_k": loss.top_k})
    _at_least(2, **{f"{at}{'' if at else 'data.'}sequence_length": stage.sequence_length})
    for key in ("lr", "gate_lr", "router_lr", "weight_decay", "max_grad_norm", "warmup_steps"):
        if (getattr(optim, key) or 0) < 0:
            raise ValueError(f"{at}optim.{key} must not be negative, got {getattr(optim, key)}")
    if optim.eps <= 0:
        raise ValueError(f"{at}optim.eps must be greater than 0, got {optim.eps}")
    for key in ("align", "distill", "cross_entropy"):
        if getattr(loss, key) < 0:
            raise ValueError(f"{at}loss.{key} must not be negative, got {getattr(loss, key)}")
    if loss.align == loss.distill == loss.cross_entropy == 0:
        raise ValueError(f"{at}loss: all weights are 0, so there is nothing to learn")
    if loss.align and (loss.distill or loss.cross_entropy):
        raise ValueError(f"{at}loss.align goes with no other loss; give it a stage of its own")
    if loss.temperature <= 0:
        raise ValueError(f"{at}loss.temperature must be positive, got {loss.temperature}")


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
