"""A run from beginning to end: prepare, evaluate, train stage by stage, evaluate again, report."""

import gc
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from t2r.evaluation import load_model, load_tokenizer, read_text
from t2r.evaluation.loading import record_of
from t2r.model import T2RForCausalLM
from t2r.training.adapters import add_adapters, base_of, check_converted, let_routers_train, with_router_lr
from t2r.training.config import TrainConfig
from t2r.training.data import PackedRows, tokenise
from t2r.training.evaluator import EvaluateEvery, Evaluator
from t2r.training.faults import explained
from t2r.training.folder import begin_folder, check_folder, is_finished
from t2r.training.fused import compile_layers, use_liger, wants_liger
from t2r.training.graphs import wants_graphs
from t2r.training.plan import Plan, disk_needed, network_of, plan_run
from t2r.training.recipe import dtype_of, load_config, stages_of
from t2r.training.report import write_report
from t2r.training.sharded import check_shards, check_zero3, is_sharded, launched_sharded, whole_state
from t2r.training.stages import (
    Stage,
    check_checkpoint,
    keep_last_checkpoint,
    last_checkpoint,
    plan_stages,
    step_of,
    where_to_go_on,
)
from t2r.training.summary import summarise_training
from t2r.training.teachers import (
    OwnTeacher,
    SeparateTeacher,
    Teacher,
    check_teacher,
    describe_teacher,
    needs_separate_teacher,
)
from t2r.training.trainer import T2RTrainer, training_arguments
from t2r.training.watch import ProgressLine, StopOnSigterm, Terminated
from t2r_conversion.record import read_record, write_record
from t2r_conversion.writer import check_space


def run(path: str | Path, overrides: list[str] | None = None, *, resume: bool = False, overwrite: bool = False) -> dict:
    """Finetune a converted model as a configuration says.

    The run's folder then holds the adapters with the added parameters, the resolved configuration, the record,
    `report.md` and `report.png`.

    Args:
        path: a YAML file; see `TrainConfig`.
        overrides: `key=value`, stronger than the file.
        resume: go on from the last checkpoint, if there is one.
        overwrite: delete an earlier run in the same folder first.

    Returns:
        The run's record.

    Raises:
        ValueError: the configuration, the model, a text or the output folder is not what it should be, or the loss
            is no number.
        Terminated: SIGTERM came; a checkpoint has been saved.
    """
    config = load_config(path, overrides)
    if resume and overwrite:
        raise ValueError("give either resume, which goes on with an earlier run, or overwrite, which deletes it")
    if Path(config.model).is_dir():
        config.model = str(Path(config.model).resolve())  # a merge may be called from another folder
    output, state = Path(config.output), _processes()
    if resume and is_finished(output):
        Console(stderr=True).print(f"{output}: finished already; report: {output / 'report.md'}", highlight=False)
        return read_record(output)
    if config.eval.text:
        read_text(config.eval.text)  # better to fail now than after the model is loaded
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{config.model}: its tokenizer has no end-of-sequence token, which must end each document")
    config = with_router_lr(config, network_of(config.model))
    check_folder(config, resume, overwrite)
    on_cuda = state.device.type == "cuda"
    dtype = dtype_of(config, on_cuda)
    bf16, liger = on_cuda and dtype == "bfloat16", wants_liger(config, on_cuda)
    stages = plan_stages(config, state.num_processes)
    converted = record_of(config.model)
    check_teacher(config, [stage.config for stage in stages], converted)
    check_zero3(stages)
    for stage in stages:
        training_arguments(config, stage, bf16)  # better to fail now than when its turn comes
    with state.main_process_first():
        tokens = tokenise(config.data, tokenizer)
    rows = [PackedRows(tokens, stage.config.sequence_length) for stage in stages]
    set_seed(config.seed)
    model, teacher = _student_and_teacher(config, dtype, str(state.device))
    graphs = wants_graphs(config, base_of(model).config, model.num_parameters(), dtype, state)
    for network in (model, teacher.model) if isinstance(teacher, SeparateTeacher) else (model,):
        if liger:
            use_liger(network)
        if config.torch_compile:
            compile_layers(network)

    if not resume:
        freed = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) if overwrite else 0
        check_space(output.absolute(), disk_needed(config, model, stages, launched_sharded()) - freed)
    if launched_sharded() and len(stages) > 1:
        check_shards(model, state.num_processes)
    evaluator = Evaluator(config.eval, tokenizer, model, teacher, state) if config.eval.text else None
    state.wait_for_everyone()  # before the folder that everyone has checked changes
    if state.is_main_process:
        begin_folder(config, overwrite)
    state.wait_for_everyone()
    record = (read_record(output) if resume else {}) or _inherited(converted)
    if evaluator and "evaluation" not in record:
        record["evaluation"] = evaluator.before()
        if state.is_main_process:
            write_record(output, record)

    if state.is_main_process:
        Console(stderr=True).print(f"teacher: {describe_teacher(config)}", highlight=False)
    line = ProgressLine(stages)
    watchers = [line]
    if evaluator and config.eval.every:

        def keep(figures: dict) -> None:
            if state.is_main_process:
                during = {entry["step"]: entry for entry in record["evaluation"].get("during", ())}
                during[figures["step"]] = figures  # a resumed run may come by here again
                record["evaluation"]["during"] = [during[step] for step in sorted(during)]
                write_record(output, record)

        evaluator.prepare()
        watchers.append(EvaluateEvery(evaluator, config.eval.every, keep))
    with line:
        record["history"] = _through_stages(model, teacher, config, stages, rows, watchers, bf16, resume, state, graphs)
    whole = {"state_dict": whole_state(model, state.is_main_process)} if is_sharded(model) else {}
    if state.is_main_process:
        model.save_pretrained(output, **whole)
    (output / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card
    record["training"] = summarise_training(config, model, stages, tokens, record["history"], dtype, state.device)
    if evaluator:
        if state.is_main_process:
            write_record(output, record)  # a kill from here on costs the last table alone
        record["evaluation"] |= evaluator.after()
    if state.is_main_process:
        write_record(output, record)
        Console(stderr=True).print(f"report: {write_report(output)}", highlight=False)
    state.wait_for_everyone()
    return record


def leave_the_others() -> None:
    """End this process's part among several, before it exits: threads that still hold tensors would abort an exit."""
    gc.collect()  # models and trainers refer to the process group
    PartialState().destroy_process_group()


def dry_run(path: str | Path, overrides: list[str] | None = None) -> Plan:
    """What `run` would do on as many processes as there are; see `plan_run`.

    Raises:
        ValueError: the recipe or the model is not what it should be.
    """
    return plan_run(load_config(path, overrides), _processes().num_processes)


def _processes() -> PartialState:
    """This process among the others. Without a GPU accelerate wants to be told that several processes are on CPUs."""
    waiting = {"timeout": timedelta(hours=6)}  # for the main process to tokenise, or to evaluate
    on_cpus = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    return PartialState(**waiting | ({"cpu": True} if on_cpus else {}))


def _student_and_teacher(config: TrainConfig, dtype: str, device: str) -> tuple[T2RForCausalLM | PeftModel, Teacher]:
    """The model to train, and what it learns from. All that trains is fp32."""

    def load(dtype: str, bits: int | None = None) -> T2RForCausalLM:
        return load_model(config.model, dtype=dtype, device=device, bits=bits)

    model = load("float32" if needs_separate_teacher(config) else dtype)
    let_routers_train(model, stages_of(config))
    if needs_separate_teacher(config):
        check_converted(model)
        return model, SeparateTeacher(load(dtype, config.teacher_bits))
    return add_adapters(model, config.lora), OwnTeacher()


def _through_stages(
    model: T2RForCausalLM | PeftModel,
    teacher: Teacher,
    config: TrainConfig,
    stages: list[Stage],
    rows: list[PackedRows],
    watchers: list[ProgressLine | EvaluateEvery],
    bf16: bool,
    resume: bool,
    state: PartialState,
    graphs: bool,
) -> list[dict]:
    """Take the model through all stages that are not over; returns the record's history of all."""
    last, checkpoint = where_to_go_on(stages) if resume else (None, None)
    if resume and state.is_main_process:
        start = checkpoint or "the start: there is no checkpoint"
        Console(stderr=True).print(f"going on from {start}", highlight=False)
    history = []
    for stage, its_rows in zip(stages, rows, strict=True):
        here = checkpoint if stage is last else None
        if last and (stage.index < last.index or (here and step_of(here) >= stage.steps)):
            history += _over(stage, model, here)
            continue
        args = training_arguments(config, stage, bf16)
        history += _train(model, teacher, stage, its_rows, args, watchers, here, graphs)
        if state.is_main_process:
            keep_last_checkpoint(stage)
    return history


def _train(
    model: T2RForCausalLM | PeftModel,
    teacher: Teacher,
    stage: Stage,
    rows: PackedRows,
    args: TrainingArguments,
    watchers: list[ProgressLine | EvaluateEvery],
    checkpoint: Path | None,
    graphs: bool,
) -> list[dict]:
    """Take the model through a stage; returns its part of the record's history."""
    if checkpoint:  # of sharded weights the Trainer takes up what trains in this stage alone
        _take_up(checkpoint, model)
    trainer = T2RTrainer(model, teacher, stage, rows, args, watchers, graphs)
    if checkpoint:
        check_checkpoint(checkpoint, stage, sharded=trainer.sharded)
    for watcher in watchers:
        watcher.begin(trainer)
    with explained(stage.folder, trainer.accelerator.num_processes), StopOnSigterm(trainer.accelerator) as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        raise Terminated
    return _history(stage, trainer.state)


def _over(stage: Stage, model: T2RForCausalLM | PeftModel, checkpoint: Path | None) -> list[dict]:
    """The history of a stage that is over. The last such one's checkpoint is where the next stage begins."""
    if checkpoint:
        _take_up(checkpoint, model)
    kept = checkpoint or last_checkpoint(stage.folder)
    return _history(stage, TrainerState.load_from_json(str(kept / "trainer_state.json"))) if kept else []


def _take_up(checkpoint: Path, model: T2RForCausalLM | PeftModel) -> None:
    if isinstance(model, PeftModel):
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
    else:
        model.load_state_dict(load_model(checkpoint, dtype="float32", device="cpu").state_dict())


def _history(stage: Stage, state: TrainerState) -> list[dict]:
    """What the record keeps of a stage's log; steps are counted over all stages."""
    kept = ("loss", "tokens_per_second", "learning_rate", "grad_norm", "mfu", "peak_memory_mib")
    history = []
    for entry in state.log_history:
        if "loss" in entry:
            row = {"step": stage.steps_before + entry["step"], "stage": stage.name}
            row |= {key: entry[key] for key in kept if key in entry}
            gates = {key.removeprefix("gates/"): value for key, value in entry.items() if key.startswith("gates/")}
            row |= {"gates": gates} if gates else {}
            alignment = [value for key, value in entry.items() if key.startswith("alignment/")]
            history.append(row | ({"alignment": alignment} if alignment else {}))
    return history


def _inherited(base: dict) -> dict:
    """What a run's record takes over from its model's: the conversion, and what was made of it before."""
    earlier = {key: base[key] for key in ("training", "evaluation", "earlier") if key in base}
    return {key: base[key] for key in ("conversion",) if key in base} | ({"earlier": earlier} if earlier else {})
