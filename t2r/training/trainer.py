"""The Hugging Face Trainer with our objectives and parameter groups: one stage of a run."""

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import DistributedType
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from t2r.model import T2RForCausalLM
from t2r.training.adapters import base_of, parameter_groups, select_trained
from t2r.training.align import alignment_loss
from t2r.training.config import TrainConfig
from t2r.training.data import IGNORED, PackedRows, collate
from t2r.training.flops import flops_per_token, peak_flops
from t2r.training.gates import gate_statistics, watched_gates
from t2r.training.graphs import GraphedPass, NotCapturable, padded_bounds
from t2r.training.predict import predicted_loss
from t2r.training.sharded import launched_sharded, set_policy, whole_state
from t2r.training.stages import Stage
from t2r.training.teachers import Teacher


class T2RTrainer(Trainer):
    """Takes a T2R model, with adapters around it or without, through a stage.

    Args:
        model: the student.
        teacher: what it learns from.
        stage: the stage.
        rows: packed training rows.
        args: from `training_arguments`.
        watchers: callbacks.
        graphs: replay forward and backward passes as CUDA graphs; see `wants_graphs`.
    """

    loss_is_scaled_for_ga = True  # we divide by the targets of the whole accumulated batch

    def __init__(
        self,
        model: T2RForCausalLM | PeftModel,
        teacher: Teacher,
        stage: Stage,
        rows: PackedRows,
        args: TrainingArguments,
        watchers: Sequence[TrainerCallback] = (),
        graphs: bool = False,
    ):
        select_trained(model, stage.config)
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=collate)
        self.stage, self.teacher = stage, teacher
        self._clock: tuple[float, int] | None = None
        self._recent: list[tuple[int, list[int], Tensor]] = []  # step, rows and loss since the last log
        self._misaligned: tuple[Tensor, Tensor] | None = None  # per-layer errors and tokens since then
        self._gates: Tensor | None = None  # as they stood in the first forward pass since then, `[layers, 3]`
        trained = [p for p in model.parameters() if p.requires_grad]
        self._graphed = GraphedPass(self._whole_pass, trained) if graphs else None
        self._peak = peak_flops(self.args.device)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded:
            set_policy(self.accelerator, model, self.args.bf16)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        for callback in watchers:
            self.add_callback(callback)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for the added parameters."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.stage.config.optim)
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = make(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss per target of the accumulated batch."""
        rows, look = inputs.pop("rows"), self._gates is None
        loss, *seen = self._loss(model, inputs, look)
        # `num_items_in_batch` counts the targets of all processes, whose gradients are then averaged.
        loss = loss / num_items_in_batch * self.accelerator.num_processes
        self._keep(rows, loss, seen)
        return (loss, None) if return_outputs else loss

    def _loss(self, model, inputs: dict, look: bool, dense: bool = False) -> tuple[Tensor, ...]:
        """The loss summed over targets, and what is seen on the way: each layer's error, or how gates stand."""
        inputs, student, weights = dict(inputs), self.model, self.stage.config.loss
        labels = inputs.pop("labels")
        with self.accelerator.autocast():  # accelerate's own covers the wrapped model's forward alone
            if weights.align:
                counted = labels != IGNORED
                average = (lambda x: self.accelerator.reduce(x, "mean")) if self.accelerator.num_processes > 1 else None
                loss, by_layer = alignment_loss(student, self.teacher, inputs, counted, average, self.sharded)
                return weights.align * loss, by_layer, counted.sum()
            with watched_gates(student) if look else nullcontext() as gates:
                loss = predicted_loss(model, student, self.teacher, inputs, labels, weights, self.sharded, dense)
            return (loss, torch.stack(gates)) if look else (loss,)

    def _keep(self, rows: list[int], loss: Tensor, seen: Sequence[Tensor]) -> None:
        """Keep what a pass came to until it is logged."""
        self._recent.append((self.state.global_step + 1, rows, loss.detach()))
        if self.stage.config.loss.align:
            self._misaligned = tuple(a + b for a, b in zip(self._misaligned or (0.0, 0.0), seen, strict=True))
        elif seen:
            (self._gates,) = seen

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput, peak memory, gates and the layers' alignment errors; stop when the loss is no number.

        Raises:
            ValueError: the loss is NaN or infinite. The checkpoint of this step has not been written then.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ValueError(self._no_number(logs["loss"]))
            now, step = time.perf_counter(), self.state.global_step
            began, first = self._clock
            logs["tokens"] = step * self.stage.tokens_per_step
            logs["tokens_per_second"] = (step - first) * self.stage.tokens_per_step / (now - began)
            if self._peak:
                work = flops_per_token(base_of(self.model).config, self.stage.config)
                logs["mfu"] = logs["tokens_per_second"] * work / (self._peak * self.accelerator.num_processes)
            if self.args.device.type == "cuda":
                logs["peak_memory_mib"] = torch.cuda.max_memory_allocated(self.args.device) // 2**20
            if self._gates is not None:
                network = base_of(self.model).config
                gates = gate_statistics(self._gates, [sum(network.slots_of(i)) for i in network.slot_layers])
                logs |= {f"gates/{name}": gates[name] for name in ("mean", "saturated", "memory")}
            if self._misaligned:
                errors, tokens = (self.accelerator.reduce(x, "sum") for x in self._misaligned)
                logs |= {f"alignment/{i}": x for i, x in enumerate((errors / tokens).tolist())}
            self._clock, self._recent, self._misaligned, self._gates = (now, step), [], None, None
        super().log(logs, start_time)

    def _no_number(self, loss: float) -> str:
        """What to say of a loss that is no number: since when, on which rows, and what to do."""
        bad = [(step, rows) for step, rows, value in self._recent if not value.isfinite()]
        since = f"step {bad[0][0]}, rows {', '.join(map(str, bad[0][1]))}" if bad else f"step {self.state.global_step}"
        return (
            f"the loss is {loss} since {since} of the data (stage {self.stage.name}); lower optim.lr or optim.gate_lr, "
            "and --resume from the last checkpoint, which is from before"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; of sharded weights, only what a checkpoint holds is gathered."""
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        state = whole_state(self.model, self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        return None

    def floating_point_ops(self, inputs: dict) -> int:
        """As `flops_per_token` has it; the Trainer would count the parameters anew in each step."""
        return flops_per_token(base_of(self.model).config, self.stage.config) * inputs["input_ids"].numel()

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds as training."""
        if self._clock:
            self._clock = self._clock[0] + seconds, self._clock[1]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer's, or its passes as a CUDA graph; the first one starts the clock."""
        self._clock = self._clock or (time.perf_counter(), self.state.global_step)
        look = self._gates is None and not self.stage.config.loss.align
        if self._graphed:
            try:
                return self._graphed_step(model, dict(inputs), num_items_in_batch, look)
            except NotCapturable as error:
                warnings.warn(f"cuda_graphs: not of this model: {error}", stacklevel=2)
                self._graphed = None
        with self._seen_through(look):
            return super().training_step(model, inputs, num_items_in_batch)

    def _graphed_step(self, model, inputs: dict, num_items_in_batch: Tensor, look: bool) -> Tensor:
        model.train()
        rows, _ = inputs.pop("rows"), inputs.pop("max_seqlen")  # a graph is for all lengths
        inputs = self._prepare_inputs(inputs)
        inputs["cu_seqlens"] = padded_bounds(inputs["cu_seqlens"], inputs["input_ids"].numel())
        scale = torch.as_tensor(1 / num_items_in_batch, dtype=torch.float32, device=self.args.device)
        loss, *seen = self._graphed(inputs | {"scale": scale}, look)
        self._keep(rows, loss, seen)
        return loss

    def _whole_pass(self, inputs: dict[str, Tensor], look: bool) -> tuple[Tensor, ...]:
        """Forward and backward, without a word to the host."""
        inputs = inputs | {"max_seqlen": self.stage.config.sequence_length}
        scale = inputs.pop("scale")
        with self._seen_through(look):
            loss, *seen = self._loss(self.model_wrapped, inputs, look, dense=True)
            loss = loss * scale
            self.accelerator.backward(loss)
        return loss.detach(), *seen

    def _seen_through(self, look: bool):
        """A context for a pass: compiled layers would pass over the hooks of one that is looked into."""
        looked_into = look or self.stage.config.loss.align
        return torch.compiler.set_stance("force_eager") if looked_into else nullcontext()


def _reduction() -> dict:
    """How gradients of sharded weights are reduced: in each micro-batch, which also leaves less of them in memory.

    Where it waits for the last one, FSDP2 of torch 2.11 now and then gathers weights wrongly in the next forward pass.
    """
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}} if launched_sharded() else {}


def training_arguments(config: TrainConfig, stage: Stage, bf16: bool) -> TrainingArguments:
    """The Trainer's own arguments for a stage; `bf16` for autocast."""
    optim, align = stage.config.optim, bool(stage.config.loss.align)
    arguments = TrainingArguments(
        output_dir=str(stage.folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.config.batch_size,
        gradient_accumulation_steps=stage.config.gradient_accumulation,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        adam_epsilon=optim.eps,
        bf16=bf16,
        save_steps=config.save_every,
        save_total_limit=config.save_limit,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        seed=config.seed + stage.index,
        data_seed=config.seed + stage.index,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()} | _reduction(),
        ddp_find_unused_parameters=False,
        # Alignment keeps one layer's activations at a time as it is. (Newer versions rename the argument.)
        **({"gradient_checkpointing": True} if config.gradient_checkpointing and not align else {}),
    )
    if arguments.n_gpu > 1:  # one process that sees several GPUs: the Trainer would copy the model to all of them
        arguments._n_gpu = 1
    return arguments
