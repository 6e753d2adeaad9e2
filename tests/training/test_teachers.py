"""The two teachers, and training everything."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import t2r.training.trainer
from t2r.training import load_config, merge, plan_run, run
from t2r.training.align import alignment_loss
from t2r.training.config import LossConfig
from t2r.training.objective import chunked_loss, token_loss
from t2r.training.teachers import OwnTeacher, SeparateTeacher
from tests.model.tiny import shake, student, tokens
from tests.model.tiny import teacher as tiny_teacher
from tests.training.tiny import learnt, workspace

TRAINER = t2r.training.trainer.T2RTrainer


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path)


def converted():
    model = student(tiny_teacher())
    shake(model)
    return model


def gradients_with(teacher, model, x):
    """Losses, distilled and aligned, and the gates' gradients."""
    with teacher.active(model) as base:
        reference, head = base(x, skip_logits=True, use_cache=False).hidden_states[0], base.lm_head
    hidden = model(x, skip_logits=True, use_cache=False).hidden_states[0]
    own_head = model.get_base_model().lm_head
    distilled = chunked_loss(own_head, hidden, x, reference, token_loss(LossConfig()), head)
    aligned, _ = alignment_loss(model, teacher, {"input_ids": x}, torch.ones_like(x, dtype=torch.bool))
    gates = [p for name, p in model.named_parameters() if "f_proj" in name and p.requires_grad]
    return [distilled, aligned, *torch.autograd.grad(distilled + aligned, gates)]


def test_a_shared_teacher_is_a_separate_one():
    source, x = converted(), tokens(2, 40)
    copy = student(tiny_teacher())
    copy.load_state_dict(source.state_dict())
    model = learnt(source)
    own, separate = (gradients_with(teacher, model, x) for teacher in (OwnTeacher(), SeparateTeacher(copy)))
    for a, b in zip(own, separate, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        assert a.abs().sum() > 0


def test_a_teacher_drops_nothing_out():
    model, x = learnt(student(tiny_teacher(), attention_dropout=0.5)).train(), tokens(1, 30)
    with OwnTeacher().active(model) as base:
        said = [base(x).logits for _ in range(2)]
    model.eval()
    with OwnTeacher().active(model) as base:
        assert all(torch.equal(logits, base(x).logits) for logits in said)


def test_a_separate_teacher_stays_as_it_is():
    teacher, x = SeparateTeacher(converted()), tokens(1, 30)
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    with teacher.active(None) as base:
        softmax = base(x).logits
    assert not softmax.requires_grad
    assert torch.equal(softmax, tiny_teacher()(x).logits)
    assert all(torch.equal(p, before[name]) for name, p in teacher.model.named_parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters())


FULL = [
    "trains=full",
    "stages=[{stage: align, trains: gates, steps: 2}, {stage: distill, steps: 4, optim: {lr: 1e-3}}]",
]


def test_everything_trains(config, tmp_path):
    record = run(config, [*FULL, f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2"])
    assert record["training"]["lora"] is None
    assert "second copy" in record["training"]["teacher"]
    assert record["evaluation"]["before"]["teacher"] == record["evaluation"]["after"]["teacher"]
    merge(tmp_path / "run", tmp_path / "merged")
    source, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("model", "merged")
    )
    changed = {name for name in source if not torch.equal(source[name], merged[name])}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"} <= changed
    assert {"model.layers.1.self_attn.f_proj.weight", "model.layers.2.self_attn.q_proj.weight"} <= changed
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("after", [2, 5])
def test_resumed_is_uninterrupted(config, tmp_path, monkeypatch, after):
    whole = run(config, [*FULL, f"output={tmp_path / 'whole'}"])
    calls, step = [], TRAINER.training_step

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TRAINER, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config, FULL)
    monkeypatch.setattr(TRAINER, "training_step", step)
    resumed = run(config, FULL, resume=True)
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in whole["history"]]


@pytest.mark.parametrize("loss", [{"distill": 1.0}, {"align": 1.0, "distill": 0.0}])
def test_no_teacher_in_a_model_that_never_had_softmax_attention(config, loss):
    record = Path(load_config(config).model) / "t2r_record.json"
    record.write_text(json.dumps({"conversion": {"family": "gsa"}}))
    with pytest.raises(ValueError, match="flash-linear-attention, so it has no softmax attention to learn from"):
        run(config, [f"loss={loss}"])
    run(config, ["loss={distill: 0, cross_entropy: 1}"])


def test_a_plan_of_everything(config):
    lora, full = (plan_run(load_config(config, [f"trains={kind}"])) for kind in ("lora", "full"))
    source = AutoModelForCausalLM.from_pretrained(load_config(config).model)
    assert full.stages[0].trained_parameters == source.num_parameters()
    assert "second copy" in full.teacher
    assert "own frozen weights" in lora.teacher
    assert full.stages[0].memory["frozen weights"] == source.num_parameters() * 4
