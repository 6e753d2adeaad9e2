"""Untouched shards are taken over without a look inside."""

import json
import os
import stat

import pytest

from t2r_conversion import shards
from t2r_conversion.shards import take_over

from . import tiny
from .tiny import convert


@pytest.fixture
def file(tmp_path):
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "name").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    return tmp_path / "name"


def test_a_link_is_the_same_file(file, tmp_path):
    assert take_over(file, tmp_path / "out", hard_link=True) == "linked"
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").stat().st_ino == (tmp_path / "blob").stat().st_ino


@pytest.mark.parametrize("hard_link", [True, False])
def test_without_links_and_clones_it_is_copied(file, tmp_path, monkeypatch, hard_link):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("cross-device")))
    monkeypatch.setattr(shards, "_clone", lambda *_: False)
    assert take_over(file, tmp_path / "out", hard_link) == "copied"
    assert (tmp_path / "out").read_bytes() == b"weights"
    assert (tmp_path / "out").stat().st_ino != (tmp_path / "blob").stat().st_ino


def test_a_clone_that_fails_leaves_nothing(file, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    assert not shards._clone(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    assert shards._clone(file, tmp_path / "out")


def test_conversion_with_links(tmp_path):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    first = sorted(source.glob("*.safetensors"))[0]
    first.chmod(0o640)
    before = tiny.hashes(source)
    convert(source, tmp_path / "out", num_slots=8, hard_link=True)
    linked = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [a.stat().st_ino for a in linked[:-1]] == [b.stat().st_ino for b in sorted(source.glob("*.safetensors"))]
    assert stat.S_IMODE(first.stat().st_mode) == 0o640  # of a file that is the source's too
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["shards"] == {"linked": len(before), "written": 1}
    convert(source, tmp_path / "out", num_slots=16, hard_link=True, overwrite=True)
    assert tiny.hashes(source) == before


def test_space_is_asked_for_where_no_link_can_be(tmp_path, monkeypatch):
    source, asked = tiny.llama(tmp_path / "source"), []
    monkeypatch.setattr("t2r_conversion.check_space", lambda _, needed: asked.append(needed))
    monkeypatch.setattr("t2r_conversion.writer.check_space", lambda _, needed: asked.append(needed))
    convert(source, tmp_path / "linked", num_slots=8, hard_link=True)
    (of_links,) = asked
    asked.clear()
    monkeypatch.setattr("t2r_conversion.can_link", lambda *_: False)
    monkeypatch.setattr("t2r_conversion.writer.can_link", lambda *_: False)
    convert(source, tmp_path / "copied", num_slots=8, hard_link=True)
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert min(asked) - of_links > 0.9 * weights


def test_a_shard_with_dropped_tensors_is_written_though_others_are_linked(tmp_path):
    source = tiny.llama(tmp_path / "source", shard_size="20KB")
    spoilt = sorted(source.glob("*.safetensors"))[0]
    tiny.add_tensors(spoilt, model__layers__0__self_attn__rotary_emb__inv_freq=tiny.torch.ones(4))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = spoilt.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "out", num_slots=8, hard_link=True)
    record = json.loads((tmp_path / "out" / "t2r_record.json").read_text())["conversion"]
    assert record["shards"] == {"written": 2, "linked": len(index_files(index)) - 1}


def index_files(index):
    return set(index["weight_map"].values())
