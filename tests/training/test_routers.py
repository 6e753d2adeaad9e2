"""Routers that train."""

import pytest
import torch

from t2r.model import T2RForCausalLM
from t2r.training import merge, run
from t2r.training.adapters import ROUTER_LR
from t2r.training.plan import plan_run
from t2r.training.trainer import T2RTrainer
from tests.training.tiny import tiny_config, workspace


@pytest.fixture
def config(tmp_path):
    return workspace(tmp_path, start="routed", slots_by_layer=[[8, 12], 16, 12])


def routers(folder):
    state = T2RForCausalLM.from_pretrained(folder).state_dict()
    return torch.cat([x.flatten() for name, x in state.items() if ".router." in name])


def result(config, name, *overrides, **options):
    """Routers of a run, merged."""
    folder = config.parent / name
    run(config, [f"output={folder}", *overrides], **options)
    merge(folder, config.parent / f"{name}-merged", overwrite=True)
    return routers(config.parent / f"{name}-merged")


STAGES = "stages=[{steps: 3, optim: {router_lr: 0.01}}, {steps: 3, optim: {router_lr: 0}}]"


def test_they_learn_where_they_have_a_learning_rate(config):
    fitted = routers(config.parent / "model")
    assert torch.equal(result(config, "frozen", "optim.router_lr=0"), fitted)
    learnt = result(config, "learnt", "optim.router_lr=0.01", "steps=3")
    assert 0.005 < (learnt - fitted).abs().max() < 0.05
    assert torch.equal(result(config, "staged", STAGES, "steps=null"), learnt)  # the second stage leaves them alone


def test_they_learn_unless_told_not_to(config):
    learnt = result(config, "unset", "steps=3")
    assert torch.equal(result(config, "set", f"optim.router_lr={ROUTER_LR / 48}", "steps=3"), learnt)
    assert not torch.equal(learnt, routers(config.parent / "model"))


def test_a_stage_may_leave_the_rate_open(config):
    open_stage = "stages=[{steps: 3, optim: {router_lr: null}}]"
    assert torch.equal(result(config, "open", open_stage, "steps=null"), result(config, "unset", "steps=3"))


def test_resumed_is_uninterrupted(config, monkeypatch):
    whole = result(config, "whole", "optim.router_lr=0.01")
    step, calls = T2RTrainer.training_step, []

    def dies_in_the_fourth(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(T2RTrainer, "training_step", dies_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        result(config, "parts", "optim.router_lr=0.01")
    assert torch.equal(result(config, "parts", "optim.router_lr=0.01", resume=True), whole)


def test_everything_may_train(config):
    fitted = routers(config.parent / "model")
    assert torch.equal(result(config, "full", "trains=full", "optim.router_lr=0"), fitted)
    assert (result(config, "full-routers", "trains=full", "optim.router_lr=0.01") - fitted).abs().max() > 0.005


def test_the_plan_counts_them(config):
    counts = [
        plan_run(tiny_config(config.parent, *overrides)).stages[0].trained_parameters
        for overrides in (("optim.router_lr=0",), ())
    ]
    assert counts[1] - counts[0] == len(routers(config.parent / "model"))


def test_a_model_without_routers(tmp_path):
    with pytest.raises(ValueError, match=r"optim.router_lr: the model has no routers \(start 'window'\)"):
        run(workspace(tmp_path), ["optim.router_lr=0.01"])


def test_a_rate_below_nothing(config):
    with pytest.raises(ValueError, match="router_lr must not be negative"):
        run(config, ["optim.router_lr=-1"])
