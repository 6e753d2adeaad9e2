"""What must also hold on a CUDA device: `pytest -m gpu`."""

import os

import pytest
import torch

from t2r.training import merge, run
from t2r_kernels import SlotState, gsa, gsa_step
from tests.kernels.cases import assert_close, case
from tests.kernels.cases import run as run_case
from tests.model.tiny import shake, student, tokens
from tests.training.tiny import workspace

pytestmark = pytest.mark.gpu


def on_gpu(gsa_function):
    """The operator on the GPU, between tensors of the CPU."""

    def call(q, k, v, g, *, initial_state, s=None, **options):
        to = [x.cuda() for x in (q, k, v, g)]
        state = SlotState(*(x.cuda() for x in initial_state))
        options = {name: x.cuda() if torch.is_tensor(x) else x for name, x in options.items()}
        o, final = gsa_function(*to, s=None if s is None else s.cuda(), initial_state=state, **options)
        return o.cpu(), SlotState(*(x.cpu() for x in final))

    return call


@pytest.mark.parametrize("gates", ["mild", "ends", "overwrite"])
@pytest.mark.parametrize("T", [1, 17, 200])
def test_operator(T, gates):
    tensors = case(T, gates=gates, dtype=torch.float32)
    expected = run_case(gsa, tensors, backend="naive", hide_unwritten=True)
    assert_close(run_case(on_gpu(gsa), tensors, backend="torch", hide_unwritten=True), expected, 1e-4)


def test_packed_operator():
    tensors = case(60, B=1, n=3)
    bounds = torch.tensor([0, 7, 7, 60])
    expected = run_case(gsa, tensors, backend="naive", cu_seqlens=bounds)
    assert_close(run_case(on_gpu(gsa), tensors, backend="torch", cu_seqlens=bounds), expected, 1e-9)


def test_steps():
    with torch.no_grad():
        q, k, v, g, keys, values = (x.cuda().float() for x in case(20))
        o, final = gsa(q, k, v, g, initial_state=(keys, values), output_final_state=True)
        state = SlotState(keys.clone(), values.clone())
        steps = [gsa_step(*(x[:, t : t + 1] for x in (q, k, v, g)), state)[0] for t in range(20)]
    assert_close({"o": torch.cat(steps, 1), "k": state.keys}, {"o": o, "k": final.keys}, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("slots", [None, [[20, 8], 16, [8, 20]]], ids=["alike", "heads differ"])
@pytest.mark.parametrize("kind", ["linear_attention", "hybrid_sliding"])
def test_model_is_the_cpus(kind, slots):
    kinds = ["linear_attention", "full_attention", kind]
    model = shake(student(layer_types=kinds, hybrid_window=7, slots_by_layer=slots))
    x = tokens(2, 50)
    expected = model(x).logits
    assert (model.cuda()(x.cuda()).logits.cpu() - expected).abs().max() < 1e-3
    low = model.bfloat16()(x.cuda()).logits.float().cpu()
    assert (low - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(
    "options", [{}, {"hybrid_window": 7}, {"start": "routed", "slots_by_layer": [[20, 8], 16, [8, 20]]}]
)
def test_generation_with_padding(options):
    model = shake(student(**options)).cuda()
    prompts = [tokens(1, n, seed=n).cuda() for n in (3, 20)]
    batch = torch.cat([torch.nn.functional.pad(p, (20 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (20 - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[20 - prompt.shape[1] :], alone[0])


def test_finetune_in_bfloat16(tmp_path, monkeypatch):
    if "T2R_CACHE" not in os.environ:
        monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    config = workspace(tmp_path)
    evaluated = [f"eval.text={tmp_path / 'heldout.txt'}", "eval.window=48", "eval.limit=2"]
    record = run(config, ["steps=30", "loss.cross_entropy=1", "loss.distill=0.1", *evaluated])
    losses = [entry["loss"] for entry in record["history"]]
    assert record["training"]["dtype"] == "bfloat16"
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert record["evaluation"]["after"]["student"] < record["evaluation"]["before"]["student"]
    merge(tmp_path / "run", tmp_path / "merged")


def test_operator_is_fp32_under_autocast():
    q, k, v, g, *_ = (x.detach().float().cuda() for x in case(200, D=64, Dv=64, M=64))
    expected, _ = gsa(q, k, v, g, backend="torch")
    with torch.autocast("cuda", torch.bfloat16):
        actual, _ = gsa(q, k, v, g, backend="torch")
    assert torch.equal(actual, expected)
