"""Hub ids, with the network replaced by a folder."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from t2r_conversion import read_source, source
from tests.conversion.tiny import convert

from . import tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one model; returns the folder that downloads go to."""
    remote, cache = tiny.llama(tmp_path / "remote", shard_size="20KB"), tmp_path / "cache" / "0123abc"

    def download(name, allow_patterns):
        if name != "someone/llama":
            raise LocalEntryNotFoundError("cannot reach\nthe Hub")
        cache.mkdir(parents=True, exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    def metadata(name):
        tensors = {}
        for tensor, header in read_source(remote).tensors.items():
            info = SimpleNamespace(shape=list(header.shape), dtype=header.dtype)
            tensors.setdefault(header.shard, {})[tensor] = info
        return SimpleNamespace(
            files_metadata={shard: SimpleNamespace(tensors=infos) for shard, infos in tensors.items()}
        )

    monkeypatch.setattr(source, "snapshot_download", download)
    monkeypatch.setattr(source, "get_safetensors_metadata", metadata)
    return cache


def test_dry_run_downloads_no_weights(tmp_path, hub):
    plan = convert("someone/llama", tmp_path / "out", num_slots=8, dry_run=True)
    assert (hub / "config.json").exists()
    assert not list(hub.glob("*.safetensors"))
    assert plan.tensors == convert(tmp_path / "remote", tmp_path / "out", num_slots=8, dry_run=True).tensors


def test_convert_from_the_hub(tmp_path, hub):
    convert("someone/llama", tmp_path / "out", num_slots=8)
    assert tiny.hashes(tmp_path / "out")[:-1] == tiny.hashes(tmp_path / "remote")
    assert json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]["source"] == "someone/llama"
    assert not (hub / "optimizer.bin").exists()
    assert read_source("someone/llama").kind == "folder"


def test_headers_that_the_hub_does_not_give(hub, monkeypatch):
    def unreachable(_):
        raise HTTPError("no route to host")

    monkeypatch.setattr(source, "get_safetensors_metadata", unreachable)
    with pytest.raises(ValueError, match=r"someone/llama: no safetensors weights can be read .*no route to host"):
        read_source("someone/llama")


def test_model_that_the_hub_does_not_give(hub):
    with pytest.raises(ValueError, match=r"nobody/llama: neither a local folder nor .*cannot reach the Hub"):
        read_source("nobody/llama")
