"""A finetune from beginning to end: prepare, evaluate, train, evaluate again, report."""

from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from transformers import TrainerState
from transformers.trainer_utils import set_seed

from t2r.evaluation import load_model, load_tokenizer, read_text
from t2r.model import T2RForCausalLM
from t2r.training.adapters import add_adapters
from t2r.training.config import load_config
from t2r.training.data import PackedRows, tokenise
from t2r.training.evaluator import Evaluator
from t2r.training.folder import begin_folder, check_folder, is_finished, last_checkpoint, step_of
from t2r.training.report import write_report
from t2r.training.summary import summarise_training
from t2r.training.trainer import T2RTrainer, training_arguments
from t2r_conversion.record import read_record, write_record


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
    """
    config = load_config(path, overrides)
    if resume and overwrite:
        raise ValueError("give either resume, which goes on with an earlier run, or overwrite, which deletes it")
    if Path(config.model).is_dir():
        config.model = str(Path(config.model).resolve())  # a merge may be called from another folder
    output, state = Path(config.output), PartialState()
    if resume and is_finished(output):
        Console(stderr=True).print(f"{output}: finished already; report: {output / 'report.md'}", highlight=False)
        return read_record(output)
    if config.eval.text:
        read_text(config.eval.text)  # better to fail now than after the model is loaded
    tokenizer = load_tokenizer(config.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{config.model}: its tokenizer has no end-of-sequence token, which must end each document")
    check_folder(config, resume, overwrite)
    on_cuda = state.device.type == "cuda"
    dtype = ("bfloat16" if on_cuda else "float32") if config.dtype == "auto" else config.dtype
    args = training_arguments(config, bf16=on_cuda and dtype == "bfloat16")
    with state.main_process_first():
        rows = PackedRows(tokenise(config.data.files, config.data.column, tokenizer), config.data.sequence_length)
    set_seed(config.seed)
    model = load_model(config.model, dtype=dtype, device=str(state.device))
    if not isinstance(model, T2RForCausalLM):
        raise ValueError(
            f"{config.model}: a {model.config.model_type} model; "
            f"convert it first (t2r convert {config.model} -o OUT) and set model: OUT"
        )
    trainer = T2RTrainer(add_adapters(model, config.lora), config, rows, args)

    evaluator = Evaluator(config.eval, tokenizer, trainer.model, state) if config.eval.text else None
    state.wait_for_everyone()  # before the folder that everyone has checked changes
    if state.is_main_process:
        begin_folder(config, overwrite)
    state.wait_for_everyone()
    record = (read_record(output) if resume else {}) or _inherited(read_record(config.model))
    if evaluator and "evaluation" not in record:
        record["evaluation"] = evaluator.before()
        if state.is_main_process:
            write_record(output, record)

    checkpoint = last_checkpoint(output) if resume else None
    if resume and state.is_main_process:
        Console(stderr=True).print(
            f"going on from {checkpoint or 'the start: there is no checkpoint'}", highlight=False
        )
    _train(trainer, checkpoint)
    trainer.model.save_pretrained(output, is_main_process=state.is_main_process)
    (output / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card
    record["history"] = [
        {key: entry[key] for key in ("step", "loss", "tokens_per_second", "learning_rate", "grad_norm") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    record["training"] = summarise_training(config, trainer, rows, record["history"], dtype)
    if evaluator:
        if state.is_main_process:
            write_record(output, record)  # a kill from here on costs the last table alone
        record["evaluation"] |= evaluator.after()
    if state.is_main_process:
        write_record(output, record)
        Console(stderr=True).print(f"report: {write_report(output)}", highlight=False)
    state.wait_for_everyone()
    return record


def _train(trainer: T2RTrainer, checkpoint: Path | None) -> None:
    if checkpoint is None or step_of(checkpoint) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    # All steps are taken, and the Trainer would take one more.
    trainer.model.load_adapter(str(checkpoint), trainer.model.active_adapter, is_trainable=True)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _inherited(base: dict) -> dict:
    """What a run's record takes over from its model's: the conversion, and what was made of it before."""
    earlier = {key: base[key] for key in ("training", "evaluation", "earlier") if key in base}
    return {key: base[key] for key in ("conversion",) if key in base} | ({"earlier": earlier} if earlier else {})
