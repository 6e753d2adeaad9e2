"""The finetune's configuration: typed, from a YAML file and `key=value` overrides."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass
class DataConfig:
    """What is learnt from.

    Attributes:
        files: `.txt` (a document each), `.jsonl`, `.json` or `.parquet` files.
        column: the column of JSON and Parquet files that holds the text.
        sequence_length: tokens of a row; documents are packed into rows and cut where a row ends.
    """

    files: list[str] = MISSING
    column: str = "text"
    sequence_length: int = 1024


@dataclass
class LoraConfig:
    """The adapters on the source's own projections (PEFT's LoRA).

    Attributes:
        r: rank.
        alpha: the update is scaled by `alpha / r`.
        dropout: on the adapters' input.
        targets: names of the linear layers that get one.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class LossConfig:
    """What is minimised: a weighted sum, per predicted token.

    Attributes:
        distill: weight of the KL divergence from the teacher, whose weights are the student's own frozen ones.
        cross_entropy: weight of the cross-entropy with the text.
        temperature: of both models in the KL divergence, which is scaled by its square.
    """

    distill: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0


@dataclass
class OptimConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate of the adapters.
        gate_lr: peak learning rate of the parameters that conversion added; they want 5 to 20 times `lr`.
        schedule: a transformers schedule: cosine, linear, constant_with_warmup, ...
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: on the adapters; the added parameters have none.
        max_grad_norm: gradients are clipped to this norm.
    """

    lr: float = 1e-3
    gate_lr: float = 1e-2
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass
class EvalConfig:
    """Perplexity of student and teacher before and after, on a text that is not trained on.

    Attributes:
        text: a UTF-8 text file; none for no evaluation.
        window: tokens of each non-overlapping window.
        limit: windows at most.
    """

    text: str | None = None
    window: int = 1024
    limit: int | None = 32


@dataclass
class TrainConfig:
    """A finetune.

    Attributes:
        model: a converted model: a folder or a Hub id.
        output: folder of the run.
        data: what is learnt from.
        lora: the adapters.
        loss: the objective.
        optim: the optimizer.
        eval: perplexity before and after.
        steps: optimizer steps.
        batch_size: rows in one forward pass, per process.
        gradient_accumulation: forward passes to an optimizer step.
        save_every: steps between checkpoints.
        save_limit: checkpoints kept.
        log_every: steps between log lines.
        seed: of adapters, data order and dropout.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        dtype: of the frozen weights: float32, bfloat16, or auto (bfloat16 on CUDA, with autocast; else float32).
        report_to: trackers that transformers knows (tensorboard, wandb, ...).
    """

    model: str = MISSING
    output: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int = MISSING
    batch_size: int = 1
    gradient_accumulation: int = 1
    save_every: int = 500
    save_limit: int = 2
    log_every: int = 10
    seed: int = 0
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    report_to: list[str] = field(default_factory=list)


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a configuration.

    Args:
        path: a YAML file.
        overrides: `key=value` or `section.key=value`, stronger than the file.

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
        merged = OmegaConf.merge(
            OmegaConf.structured(TrainConfig), OmegaConf.load(path), OmegaConf.from_dotlist(overrides or [])
        )
        config: TrainConfig = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from error
    _check(config, path)
    return config


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def as_dict(config: TrainConfig) -> dict:
    """The configuration as plain dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def _one_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's message with the key's full name, without its lines about types."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return message if not key or f"'{key}'" in message else f"{message} (at {key})"


def _check(config: TrainConfig, path: Path) -> None:
    at_least_one = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "gradient_accumulation": config.gradient_accumulation,
        "save_every": config.save_every,
        "save_limit": config.save_limit,
        "log_every": config.log_every,
        "lora.r": config.lora.r,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{path}: {key} must be at least 1, got {value}")
    for key in ("lr", "gate_lr", "weight_decay", "max_grad_norm", "warmup_steps"):
        if getattr(config.optim, key) < 0:
            raise ValueError(f"{path}: optim.{key} must not be negative, got {getattr(config.optim, key)}")
    if config.data.sequence_length < 2:
        raise ValueError(f"{path}: data.sequence_length must be at least 2, got {config.data.sequence_length}")
    if not config.data.files:
        raise ValueError(f"{path}: data.files names no file")
    for key in ("distill", "cross_entropy"):
        if getattr(config.loss, key) < 0:
            raise ValueError(f"{path}: loss.{key} must not be negative, got {getattr(config.loss, key)}")
    if config.loss.distill == config.loss.cross_entropy == 0:
        raise ValueError(f"{path}: loss.distill and loss.cross_entropy are both 0, so there is nothing to learn")
    if config.loss.temperature <= 0:
        raise ValueError(f"{path}: loss.temperature must be positive, got {config.loss.temperature}")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"{path}: dtype must be auto, float32 or bfloat16, got {config.dtype!r}")
