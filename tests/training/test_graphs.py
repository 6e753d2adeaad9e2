"""Passes as CUDA graphs: here with a stand-in for the capture that runs the same pass on the same buffers again."""

import os
import sys

import pytest
import torch

from t2r.training import run
from t2r.training.graphs import Captured, GraphedPass, NotCapturable, padded_bounds
from t2r.training.trainer import T2RTrainer
from tests.training.tiny import workspace

STAGES = "stages=[{stage: align, steps: 3}, {stage: distill, steps: 4}, {stage: finetune, steps: 3, trains: gates}]"


@pytest.fixture
def config(tmp_path, monkeypatch):
    if "T2R_CACHE" not in os.environ:
        monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path)


@pytest.fixture
def captures(monkeypatch):
    """Lets runs use graphs on a CPU; lists what is captured."""
    made = []

    def capture(self, inputs, kind):
        so_far = [buffer.clone() for buffer in self.gradients]
        outputs = tuple(x.clone() for x in self.run(inputs, kind))
        torch._foreach_copy_(self.gradients, so_far)
        made.append((kind, {name: tuple(x.shape) for name, x in inputs.items()}))

        def replay():
            for x, new in zip(outputs, self.run(inputs, kind), strict=True):
                x.copy_(new)

        return Captured(inputs, outputs, replay)

    monkeypatch.setattr(GraphedPass, "_capture", capture)
    monkeypatch.setattr(sys.modules["t2r.training.run"], "wants_graphs", lambda *_: True)
    return made


def figures(record):
    kept = ("loss", "grad_norm", "gates", "alignment")
    return [{key: entry[key] for key in kept if key in entry} for entry in record["history"]]


def close(a, b, rel=1e-4):
    assert len(a) == len(b)
    for mine, other in zip(a, b, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert value == pytest.approx(other[key], rel=rel), key


@pytest.mark.parametrize("options", [[], ["gradient_accumulation=3", "log_every=2"]], ids=["plain", "accumulated"])
def test_graphed_is_eager(config, captures, monkeypatch, options):
    graphed = run(config, [STAGES, *options])
    # To align, one; in the other stages one that looks into the gates and, if not every pass does, one that does not.
    assert len(captures) == (5 if options else 3)
    assert {shapes["cu_seqlens"] for _, shapes in captures} == {(33,)}
    monkeypatch.undo()
    monkeypatch.setenv("T2R_CACHE", str(config.parent / "cache"))
    eager = run(config, [STAGES, *options], overwrite=True)
    close(figures(graphed), figures(eager))


def test_what_cannot_be_captured_goes_on_without(config, captures, monkeypatch):
    def refuse(*_):
        raise NotCapturable("operation not permitted when stream is capturing")

    expected = run(config)
    monkeypatch.setattr(GraphedPass, "_capture", refuse)
    with pytest.warns(UserWarning, match="cuda_graphs: not of this model: operation not permitted"):
        record = run(config, overwrite=True)
    close(figures(record), figures(expected))


def test_graphs_need_a_gpu(config):
    with pytest.raises(ValueError, match="cuda_graphs: true needs a GPU and dtype: bfloat16; leave it unset"):
        run(config, ["cuda_graphs=true"])


@pytest.mark.parametrize(("documents", "wanted"), [(1, 32), (32, 32), (33, 64), (100, 128)])
def test_bounds_are_padded_with_empty_documents(documents, wanted):
    bounds = torch.arange(documents + 1, dtype=torch.int32) * 7
    padded = padded_bounds(bounds, 7 * documents)
    assert len(padded) == wanted + 1
    assert torch.equal(padded[: documents + 1], bounds)
    assert (padded[documents:] == 7 * documents).all()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["gradient_accumulation=3", "log_every=2"]], ids=["plain", "accumulated"])
def test_graphed_is_eager_on_a_gpu(config, tmp_path, monkeypatch, options, recwarn):
    eager = run(config, [STAGES, *options, "cuda_graphs=false"])
    captured, capture = [], GraphedPass._capture
    monkeypatch.setattr(GraphedPass, "_capture", lambda *a: captured.append(a[2]) or capture(*a))
    graphed = run(config, [STAGES, *options], overwrite=True)
    assert len(captured) == (5 if options else 3)
    assert not [w for w in recwarn if "cuda_graphs" in str(w.message)]
    close(figures(graphed), figures(eager), rel=0.01)


@pytest.mark.gpu
def test_graphed_is_resumed_bit_for_bit(config, tmp_path, monkeypatch):
    options = ["lora.dropout=0.2", "steps=8", "cuda_graphs=true"]
    whole = run(config, options)
    with monkeypatch.context() as patched:
        step, calls = T2RTrainer.training_step, []

        def dies(self, *arguments):
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt
            return step(self, *arguments)

        patched.setattr(T2RTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config, options, overwrite=True)
    resumed = run(config, options, resume=True)
    assert [entry["loss"] for entry in resumed["history"]] == [entry["loss"] for entry in whole["history"]]
