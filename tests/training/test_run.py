"""Whole finetunes of a tiny model."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import t2r.training.trainer
from t2r.training import merge, run
from t2r.training.adapters import add_adapters, parameter_groups
from t2r.training.config import LoraConfig, OptimConfig
from t2r.training.evaluator import Evaluator
from t2r.training.teachers import OwnTeacher
from tests.model.tiny import shake, student, tokens
from tests.model.tiny import teacher as tiny_teacher
from tests.training.tiny import run_on_two_processes, workspace


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path)


def losses(record):
    return [entry["loss"] for entry in record["history"]]


def test_a_run_from_beginning_to_end(config, tmp_path):
    options = ["steps=20", f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=4"]
    record = run(config, [*options, "loss.cross_entropy=1", "loss.distill=0"])
    assert len(losses(record)) == 20
    assert sum(losses(record)[-5:]) < 0.8 * sum(losses(record)[:5])
    evaluation = record["evaluation"]
    assert evaluation["after"]["student"] < evaluation["before"]["student"]
    assert evaluation["after"]["teacher"] == evaluation["before"]["teacher"]
    assert record["training"]["tokens"] == 20 * 2 * 32
    assert record["conversion"] == {"source": "tiny"}
    output = tmp_path / "run"
    assert json.loads((output / "t2r_record.json").read_text()) == record
    assert {"config.yaml", "report.md", "report.png", "adapter_model.safetensors"} <= {p.name for p in output.iterdir()}
    assert str(tmp_path) not in (output / "t2r_record.json").read_text()
    report = (output / "report.md").read_text()
    assert f"| **all** | {evaluation['before']['teacher']:.2f} | {evaluation['before']['student']:.2f} |" in report


@pytest.mark.parametrize(
    "options",
    [
        ["lora.dropout=0.2"],
        ["log_every=3"],
        ["steps=12", "batch_size=5"],  # several passes over the rows
        ["gradient_accumulation=2"],
    ],
    ids=" ".join,
)
def test_resumed_is_uninterrupted_bit_for_bit(config, tmp_path, monkeypatch, options):
    whole = run(config, options)
    shutil.rmtree(tmp_path / "run")

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    step = t2r.training.trainer.T2RTrainer.training_step
    calls = []

    def dies_in_the_sixth(self, *args, **kwargs):
        calls.append(1)
        return killed() if len(calls) == 6 else step(self, *args, **kwargs)

    monkeypatch.setattr(t2r.training.trainer.T2RTrainer, "training_step", dies_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run(config, options)
    monkeypatch.setattr(t2r.training.trainer.T2RTrainer, "training_step", step)
    checkpoints = sorted((tmp_path / "run").glob("*/checkpoint-*"))
    if len(checkpoints) > 1:  # the kill has torn the last one: the one before it serves
        (checkpoints[-1] / "trainer_state.json").unlink()
        with pytest.warns(UserWarning, match=r"checkpoint-4 lacks trainer_state\.json; it is passed over"):
            resumed = run(config, options, resume=True)
    else:
        resumed = run(config, options, resume=True)
    assert losses(resumed) == losses(whole)
    assert [e["grad_norm"] for e in resumed["history"]] == [e["grad_norm"] for e in whole["history"]]
    assert [e["step"] for e in resumed["history"]] == [e["step"] for e in whole["history"]]


def test_the_last_steps_are_logged_too(config):
    options = ["log_every=4", "save_every=100"]
    assert [entry["step"] for entry in run(config, options)["history"]] == [4, 6]


def test_a_finished_run_is_not_run_again(config):
    first = run(config)
    assert run(config, resume=True) == first


def test_accumulation_changes_nothing(config, tmp_path):
    whole = run(config, ["batch_size=4", f"output={tmp_path / 'a'}"])
    pieces = run(config, ["batch_size=1", "gradient_accumulation=4", f"output={tmp_path / 'b'}"])
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-4)


def test_two_processes_are_one_with_their_batches(config, tmp_path):
    alone = run(config, ["batch_size=4", f"output={tmp_path / 'alone'}"])
    together = run_on_two_processes(config)
    assert together["training"]["tokens"] == alone["training"]["tokens"]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    plain = run(config, [f"output={tmp_path / 'a'}"])
    checkpointed = run(config, ["gradient_checkpointing=true", f"output={tmp_path / 'b'}"])
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


def test_merged_is_the_finetuned_model(config, tmp_path):
    run(config, ["steps=10"])
    merge(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    x = tokens(2, 30) % 25
    with torch.no_grad():
        expected = adapted(x).logits
        assert (merged(x).logits - expected).abs().max() < 1e-4
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "model")(x).logits - expected).abs().max() > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    gates = "model.layers.0.self_attn.f_proj.weight"
    assert merged.state_dict()[gates].abs().sum() > 0  # zero at the start
    with pytest.raises(ValueError, match="exists already"):
        merge(tmp_path / "run", tmp_path / "merged")
    merge(tmp_path / "run", tmp_path / "merged", overwrite=True)


def test_a_merge_does_not_take_its_runs_place(config, tmp_path):
    run(config, ["trains=full", "steps=2"])
    with pytest.raises(ValueError, match="holds the source, so not overwritten"):
        merge(tmp_path / "run", tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_merge_needs_a_finished_run(config, tmp_path):
    with pytest.raises(ValueError, match=r"model: no adapter_config\.json, .*give a run of t2r train"):
        merge(tmp_path / "model", tmp_path / "out")
    (tmp_path / "run").mkdir()
    shutil.copy(config, tmp_path / "run" / "config.yaml")
    with pytest.raises(ValueError, match="not finished"):
        merge(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_says_when_the_base_is_gone(config, tmp_path):
    run(config, ["steps=1"])
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="model: no such folder"):
        merge(tmp_path / "run", tmp_path / "out")


def test_merge_from_another_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(config, ["model=model", "output=run", "steps=1"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge(tmp_path / "run", "merged")
    assert (tmp_path / "elsewhere" / "merged" / "model.safetensors").is_file()


def test_a_finetune_of_a_finetune_has_a_record_of_its_own(config, tmp_path, monkeypatch):
    evaluated = [f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2"]
    first = run(config, evaluated)
    merge(tmp_path / "run", tmp_path / "merged")
    options = [f"model={tmp_path / 'merged'}", f"output={tmp_path / 'second'}", "steps=4"]
    monkeypatch.setattr(t2r.training.trainer.T2RTrainer, "train", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # killed: not finished, whatever the model's record says
        run(config, [*options, *evaluated])
    monkeypatch.undo()
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    second = run(config, [*options, *evaluated], resume=True)
    assert second["training"]["steps"] == 4
    assert second["conversion"] == {"source": "tiny"}
    assert second["earlier"]["training"] == first["training"]
    assert second["evaluation"]["before"] != first["evaluation"]["before"]


def test_finetune_in_bfloat16_with_evaluation(config, tmp_path):
    record = run(config, ["dtype=bfloat16", f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2"])
    assert record["training"]["dtype"] == "bfloat16"
    merge(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}  # the base model's own


def test_a_kill_during_the_last_evaluation_costs_that_alone(config, tmp_path, monkeypatch):
    evaluated = [f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2"]
    whole = run(config, [*evaluated, f"output={tmp_path / 'whole'}"])
    monkeypatch.setattr(Evaluator, "after", lambda _self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, evaluated)
    merge(tmp_path / "run", tmp_path / "merged")
    monkeypatch.undo()
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    record = run(config, evaluated, resume=True)
    assert len(losses(record)) == 6
    assert record["evaluation"] == whole["evaluation"]


def test_a_folder_without_a_checkpoint_is_started_afresh(config, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(config, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "t2r_record.json").write_text('{"evaluation": {"before": {}}}')
    assert "evaluation" not in run(config)


def test_a_resumed_run_tells_what_has_changed(config, capsys):
    run(config, ["steps=2", "lora.options={use_rslora: true}"])
    (config.parent / "run" / "t2r_record.json").unlink()
    run(config, ["steps=2", "lora.options={lora_bias: false}"], resume=True)
    told = " ".join(capsys.readouterr().err.split())
    assert "lora.options.use_rslora True → None" in told
    assert "lora.options.lora_bias None → False" in told


def test_resume_or_overwrite(config):
    with pytest.raises(ValueError, match="give either resume"):
        run(config, resume=True, overwrite=True)


def test_output_folders_are_safe(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and no t2r train run"):
        run(config, overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").exists()
    (tmp_path / "run" / "thesis.txt").unlink()
    run(config, ["steps=1"])
    with pytest.raises(ValueError, match="--resume goes on with it, --overwrite deletes it"):
        run(config)
    assert len(losses(run(config, ["steps=2"], overwrite=True))) == 2


def test_a_loss_that_is_no_number_stops(config, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) since step \d+, rows \d+, \d+ of the data"):
        run(config, ["optim.lr=1e30", "optim.max_grad_norm=1e30", "steps=20", "log_every=5"])
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))  # what was broken is not kept


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.targets=[q_prj]"], "lora.targets: q_prj cannot have adapters; choose from .*q_proj"),
        (["lora.targets=[lm_head]"], "lora.targets: lm_head cannot have adapters"),
        (["lora.targets=[q_proj,f_proj]"], "lora.targets: f_proj cannot have adapters"),
        (["eval.text=train.jsonl", "eval.window=1"], "window must be at least 2|no such text"),
        (["optim.lr=-1"], "optim.lr must not be negative"),
        (["eval.text=none.txt"], "no such text file"),
        (["data.sequence_length=100000"], "less than one row"),
        (["model=nowhere/model/at/all"], "no such folder"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(config, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(config, overrides)
    assert not (tmp_path / "run").exists()


def test_only_converted_models(config, tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "plain")
    shutil.copy(tmp_path / "model" / "tokenizer.json", tmp_path / "plain")
    shutil.copy(tmp_path / "model" / "tokenizer_config.json", tmp_path / "plain")
    with pytest.raises(ValueError, match="a llama model; convert it first"):
        run(config, [f"model={tmp_path / 'plain'}"])
    with pytest.raises(ValueError, match="no Gated Slot Attention layer"):
        add_adapters(student(layer_types=["full_attention"] * 3), LoraConfig())


@pytest.mark.parametrize("start", ["window", "routed", "paper"])
def test_the_teacher_is_the_source_whatever_the_adapters_learn(start):
    source, x = tiny_teacher(), tokens(2, 30)
    model = add_adapters(student(source, start=start), LoraConfig(r=4))
    shake(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p))
        before = model(x).logits
        with OwnTeacher().active(model) as base:
            assert torch.equal(base(x).logits, source(x).logits)
        assert torch.equal(model(x).logits, before)
    assert (before - source(x).logits).abs().max() > 0.1


@pytest.mark.parametrize("start", ["window", "routed", "paper"])
def test_what_trains_and_how_fast(start):
    model = add_adapters(student(start=start), LoraConfig(r=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    added = {name for name in trained if "f_proj" in name or "g_norm" in name}
    assert all("lora_" in name for name in trained - added)
    assert len(added) == 3 * 2  # weight and bias, or weight and norm, of three layers
    adapters, gates = parameter_groups(model, OptimConfig(lr=1.0, gate_lr=2.0, weight_decay=0.5))
    assert (adapters["lr"], gates["lr"], gates["weight_decay"]) == (1.0, 2.0, 0.0)
    assert len(gates["params"]) == len(added)
    assert len(adapters["params"]) == len(trained - added)


@pytest.mark.parametrize(
    "stages", ["[{stage: distill, steps: 1}, {stage: finetune, steps: 1}]", "[{stage: align, steps: 1}]"]
)
@pytest.mark.parametrize("file", [True, False])
def test_zero3_takes_one_stage_that_does_not_align(config, tmp_path, monkeypatch, stages, file):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if file:
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    else:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match="one stage that does not align; use FSDP2"):
        run(config, [f"stages={stages}"])
    assert not (tmp_path / "run").exists()
