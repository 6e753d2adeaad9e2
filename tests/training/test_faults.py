"""What breaks a run from outside."""

import errno
import os
import sys

import pytest
import torch

from t2r.training import run
from t2r.training.faults import explained
from t2r.training.watch import ProgressLine
from tests.training.tiny import run_on_two_processes, workspace


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    return workspace(tmp_path)


def test_a_disk_that_fills_up(config, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(value, path, *args, **kwargs):
        calls.append(path)
        if len(calls) > 4:  # in the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"1-distill: the disk is full; make room, and --resume"):
        run(config)
    monkeypatch.setattr(torch, "save", save)
    with pytest.warns(UserWarning, match="is passed over"):
        record = run(config, resume=True)
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_too_small(config, tmp_path, monkeypatch):
    module = sys.modules["t2r.training.run"]
    monkeypatch.setattr(module, "disk_needed", lambda *_: 2**60)
    with pytest.raises(ValueError, match="bytes needed"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_overwriting_makes_room(config, tmp_path, monkeypatch):
    run(config)
    module = sys.modules["t2r.training.run"]
    held = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    asked = []
    monkeypatch.setattr(module, "check_space", lambda _, needed: asked.append(needed))
    monkeypatch.setattr(module, "disk_needed", lambda *_: held + 1000)
    run(config, overwrite=True)
    assert asked == [1000]


def test_an_error_ends_the_progress_line(config, monkeypatch):
    lines, start = [], ProgressLine.on_train_begin

    def begin(self, *args, **kwargs):
        lines.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(ProgressLine, "on_train_begin", begin)
    with pytest.raises(ValueError, match=r"loss is (nan|inf)"):
        run(config, ["optim.lr=1e30"])
    assert [line.progress for line in lines] == [None]


def test_torch_does_not_say_that_the_disk_is_full(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="the disk is full"), explained(tmp_path, 1):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 43584 vs 43476")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), explained(tmp_path, 2):
        raise RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match=r"^Connection closed"), explained(tmp_path, 1):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(ValueError, match=r"seems to have ended.*Connection closed by peer"), explained(tmp_path, 2):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.skipif(sys.platform != "linux", reason="gloo")
def test_a_process_that_is_killed(config):
    stderr = run_on_two_processes(config, dies_after=2, only_rank=1)
    assert "another process of this run seems to have ended" in " ".join(stderr.split())
