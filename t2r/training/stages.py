"""The stages of a run: how long each is, where its checkpoints are, and where an interrupted run goes on."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from t2r.training.config import StageConfig, TrainConfig
from t2r.training.recipe import stages_of

# What a whole checkpoint holds: of each line, one. The Trainer writes its state last.
CHECKPOINT = (
    ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"),
    ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest"),  # all but the first of sharded ones
    ("scheduler.pt",),
    ("trainer_state.json",),
)


@dataclass(frozen=True)
class Stage:
    """One stage of a run on a number of processes.

    Attributes:
        index: its place among the stages, from 0.
        config: as the recipe has it.
        folder: where its checkpoints are.
        tokens_per_step: tokens of one optimizer step, over all processes.
        steps: optimizer steps.
        steps_before: those of the stages before it.
    """

    index: int
    config: StageConfig
    folder: Path
    tokens_per_step: int
    steps: int
    steps_before: int

    @property
    def name(self) -> str:
        """`1-align`, say: its place from 1 and its kind."""
        return self.folder.name


def plan_stages(config: TrainConfig, processes: int) -> list[Stage]:
    """A run's stages with their lengths. Warns of one that ends before its warm-up does."""
    stages: list[Stage] = []
    for i, stage in enumerate(stages_of(config)):
        tokens = stage.batch_size * stage.gradient_accumulation * stage.sequence_length * processes
        steps = -(-stage.tokens // tokens) if stage.steps is None else stage.steps
        before = stages[-1].steps_before + stages[-1].steps if stages else 0
        stages.append(Stage(i, stage, Path(config.output) / f"{i + 1}-{stage.stage}", tokens, steps, before))
        if stage.optim.warmup_steps >= steps:
            warnings.warn(
                f"{stages[-1].name} has {steps} steps, all of them warm-up; lower optim.warmup_steps "
                f"({stage.optim.warmup_steps}), or gradient_accumulation",
                stacklevel=2,
            )
    return stages


def where_to_go_on(stages: list[Stage]) -> tuple[Stage, Path] | tuple[None, None]:
    """The stage that has come farthest, and its newest whole checkpoint."""
    for stage in reversed(stages):
        if checkpoint := last_checkpoint(stage.folder):
            return stage, checkpoint
    return None, None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; one that a kill has torn is passed over."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        missing = [names[0] for names in CHECKPOINT if not any((path / name).exists() for name in names)]
        if not missing:
            return path
        warnings.warn(f"{path} lacks {', '.join(missing)}; it is passed over", stacklevel=2)
    return None


def check_checkpoint(checkpoint: Path, stage: Stage, *, sharded: bool) -> None:
    """Refuse a checkpoint that the processes at hand cannot take up; warn if they go on in other steps.

    Raises:
        ValueError: its weights were sharded and these are not, or the other way round.
    """
    if any((checkpoint / name).exists() for name in ("optimizer.bin", "optimizer_0")) != sharded:
        raise ValueError(
            f"{checkpoint} was saved {'without' if sharded else 'with'} sharded weights (FSDP); resume it likewise"
        )
    log = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    before = next((entry["tokens"] // entry["step"] for entry in reversed(log) if "tokens" in entry), None)
    if before and before != stage.tokens_per_step:
        warnings.warn(
            f"{checkpoint} comes from steps of {before:,} tokens, and these have {stage.tokens_per_step:,}: it goes on "
            "elsewhere in the data; with batch_size or gradient_accumulation steps become what they were",
            stacklevel=2,
        )


def step_of(checkpoint: Path) -> int:
    """Optimizer steps of its stage that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def keep_last_checkpoint(stage: Stage) -> None:
    """Of a stage that is over, only the last checkpoint serves: it is where the next one began."""
    for path in stage.folder.glob("checkpoint-*"):
        if step_of(path) < stage.steps:
            shutil.rmtree(path)
