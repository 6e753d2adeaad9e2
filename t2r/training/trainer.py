"""The Hugging Face Trainer with our objective, parameter groups and progress line."""

import math
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from t2r.training.adapters import parameter_groups, teacher
from t2r.training.config import TrainConfig
from t2r.training.data import PackedRows, collate
from t2r.training.objective import chunked_loss, token_loss


class T2RTrainer(Trainer):
    """Trains a PEFT-wrapped T2R model against the teacher it carries.

    Args:
        model: from `add_adapters`.
        config: the finetune.
        rows: packed training rows.
        args: from `training_arguments`.
    """

    loss_is_scaled_for_ga = True  # we divide by the targets of the whole accumulated batch

    def __init__(self, model, config: TrainConfig, rows: PackedRows, args: TrainingArguments):
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=collate)
        self.finetune = config
        self.token_loss = token_loss(config.loss)
        self._clock: tuple[float, int] | None = None
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(_ProgressLine())

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for the added parameters."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.finetune.optim)
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = make(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss per target of the accumulated batch."""
        labels = inputs.pop("labels")
        student = self.accelerator.unwrap_model(model)
        teacher_hidden = None
        with self.accelerator.autocast():  # accelerate's own covers the wrapped model's forward alone
            if self.finetune.loss.distill:
                with teacher(student) as base:
                    teacher_hidden = base(**inputs, skip_logits=True, use_cache=False).hidden_states[0]
            outputs = model(**inputs, skip_logits=True, use_cache=False)
            head, hidden = student.get_base_model().lm_head, outputs.hidden_states[0]
            loss = chunked_loss(head, hidden, labels, teacher_hidden, self.token_loss)
        # `num_items_in_batch` counts the targets of all processes, whose gradients are then averaged.
        loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the throughput, and stop when the loss is no number.

        Raises:
            ValueError: the loss is NaN or infinite.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower optim.lr or optim.gate_lr, "
                    "and resume from the last checkpoint"
                )
            now, step = time.perf_counter(), self.state.global_step
            began, first = self._clock
            logs["tokens"] = step * self.tokens_per_step
            logs["tokens_per_second"] = (step - first) * self.tokens_per_step / (now - began)
            self._clock = (now, step)
        super().log(logs, start_time)

    def training_step(self, *args, **kwargs):
        """As the Trainer's; the first one starts the clock."""
        self._clock = self._clock or (time.perf_counter(), self.state.global_step)
        return super().training_step(*args, **kwargs)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        c = self.finetune
        return c.batch_size * c.gradient_accumulation * c.data.sequence_length * self.accelerator.num_processes


def training_arguments(config: TrainConfig, bf16: bool) -> TrainingArguments:
    """The Trainer's own arguments for a finetune; `bf16` for autocast."""
    return TrainingArguments(
        output_dir=config.output,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.optim.lr,
        lr_scheduler_type=config.optim.schedule,
        warmup_steps=config.optim.warmup_steps,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
        bf16=bf16,
        save_steps=config.save_every,
        save_total_limit=config.save_limit,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),  # newer versions rename it
    )


class _ProgressLine(TrainerCallback):
    """One line on stderr: steps, loss, tokens/s, time left."""

    def __init__(self):
        self.console = Console(stderr=True)
        self.progress = None

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        columns = (TextColumn("finetune"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        # What is not logged before a checkpoint would be missing in the resumed run's log; the last steps count too.
        control.should_log |= control.should_save or state.global_step >= state.max_steps
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        if self.progress and "loss" in (logs or {}):
            note = f"loss {logs['loss']:.4f} · {logs['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.task, note=note)
            if not self.console.is_terminal:
                self.console.print(f"step {state.global_step}/{state.max_steps} · {note}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if self.progress:
            self.progress.stop()
            self.progress = None
