"""FSDP2: the losses and gradients of a model whose weights are sharded over two processes (gloo, on the CPU)."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from t2r.training.adapters import base_of
from t2r.training.align import alignment_loss
from t2r.training.config import LossConfig
from t2r.training.predict import predicted_loss
from t2r.training.sharded import check_shards, is_sharded, whole_state
from t2r.training.teachers import OwnTeacher, SeparateTeacher
from tests.model.tiny import shake, student, tokens
from tests.model.tiny import teacher as tiny_teacher
from tests.training.tiny import learnt


def setting(trains):
    torch.manual_seed(0)
    model = student(tiny_teacher())
    shake(model)
    if trains == "full":
        copy = student(tiny_teacher())
        copy.load_state_dict(model.state_dict())
        return model, SeparateTeacher(copy)
    return learnt(model), OwnTeacher()


def step(model, teacher, rows, sharded, align, reduce=None):
    """Loss and gradients of a batch, each process averaging in its own rows."""
    labels = rows.clone()
    weights = LossConfig(distill=0.7, cross_entropy=0.3)
    losses = []
    for _ in range(2):  # twice, so that what the first pass leaves behind shows
        model.zero_grad()
        inputs = {"input_ids": rows}
        if align:
            loss, _ = alignment_loss(model, teacher, inputs, rows > 3, reduce, sharded)
        else:
            loss = predicted_loss(model, model, teacher, inputs, labels, weights, sharded)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    whole = (lambda g: g.full_tensor()) if sharded else (lambda g: g)
    return losses[0], {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def mean(x):
    dist.all_reduce(x)
    return x / 2


def worker(rank, trains, align, reshard, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model, teacher = setting(trains)
    mesh = init_device_mesh("cpu", (2,))
    for layer in base_of(model).model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    loss, gradients = step(model, teacher, tokens(2, 30)[rank : rank + 1], True, align, mean)
    assert is_sharded(model)
    state = whole_state(model, keep=rank == 0)
    if rank == 0:
        torch.save((loss, gradients, state), folder / "sharded.pt")
    dist.barrier()  # who leaves first takes the connection with him
    dist.destroy_process_group()
    # The mesh keeps gloo's threads alive. One that lets go of a tensor while the interpreter ends aborts the process.
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo")
@pytest.mark.parametrize(
    ("trains", "align", "reshard"),
    [("lora", False, True), ("full", False, True), ("lora", True, True), ("full", True, True), ("lora", True, False)],
)
def test_sharded_is_whole(trains, align, reshard, tmp_path):
    mp.start_processes(worker, (trains, align, reshard, tmp_path), nprocs=2, start_method="spawn")
    loss, gradients, state = torch.load(tmp_path / "sharded.pt")
    model, teacher = setting(trains)
    own = model.state_dict()
    assert set(state) == {name for name in own if trains == "full" or "lora_" in name or "modules_to_save" in name}
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    parts = [step(model, teacher, tokens(2, 30)[i : i + 1], False, align) for i in range(2)]
    assert loss == pytest.approx(parts[0][0], rel=1e-4)
    assert gradients.keys() == parts[0][1].keys()
    for name, gradient in gradients.items():  # FSDP averages over processes
        expected = (parts[0][1][name] + parts[1][1][name]) / 2
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5), name


def test_parameters_that_leave_a_process_nothing_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 16))
    check_shards(model, 4)
    with pytest.raises(ValueError, match="weights of 16 rows cannot be shared out to 5 processes"):
        check_shards(model, 5)
