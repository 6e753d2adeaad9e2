"""Pickled weights: the same model as from safetensors, and nothing run that is in them."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from t2r_conversion import read_source

from . import tiny
from .tiny import convert


def pickled(source: Path, files: int = 1, old: bool = False) -> Path:
    """Put pickles in the place of a folder's safetensors."""
    state = tiny.load_all(source)
    for shard in source.glob("*.safetensors*"):
        shard.unlink()
    names = sorted(state)
    parts = [names[i::files] for i in range(files)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i:05d}-of-{files:05d}.bin"
        torch.save({name: state[name] for name in part}, source / file, _use_new_zipfile_serialization=not old)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


@pytest.mark.parametrize(("files", "old"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_that_of_safetensors(tmp_path, files, old, dtype):
    source = tiny.llama(tmp_path / "source", dtype=dtype)
    convert(source, tmp_path / "expected", num_slots=8)
    pickled(source, files, old)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    plan = convert(source, tmp_path / "planned", num_slots=8, dry_run=True)
    assert plan.source.kind == "pickle"
    convert(source, tmp_path / "out", num_slots=8)
    expected, actual = tiny.load_all(tmp_path / "expected"), tiny.load_all(tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert {t.name: (t.shape, t.dtype) for t in plan.having("copied", "new")} == {
        name: (tuple(x.shape), {torch.float32: "F32", torch.bfloat16: "BF16"}[x.dtype]) for name, x in actual.items()
    }
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "source"]
    names = {file.name for file in (tmp_path / "expected").iterdir()} - {"model-00001-of-00002.safetensors"}
    assert names <= {file.name for file in (tmp_path / "out").iterdir()} | {"model-00002-of-00002.safetensors"}


def test_a_tied_head_that_shares_memory(tmp_path):
    source = tiny.llama(tmp_path / "source", tie_word_embeddings=True)
    state = tiny.load_all(source)
    (source / "model.safetensors").unlink()
    torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, source / "pytorch_model.bin")
    convert(source, tmp_path / "out", num_slots=8)
    written = tiny.load_all(tmp_path / "out")
    assert "lm_head.weight" not in written
    assert torch.equal(written["model.embed_tokens.weight"], state["model.embed_tokens.weight"])


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    source = pickled(tiny.llama(tmp_path / "source"))
    for content in ({"model.norm.weight": Evil()}, Evil()):
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(ValueError, match="holds more than tensors, or is damaged; what it would run is not run"):
            read_source(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}])
def test_other_things_are_no_checkpoint(tmp_path, content):
    source = pickled(tiny.llama(tmp_path / "source"))
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a checkpoint's tensors by name"):
        read_source(source)


@pytest.mark.parametrize("cut", [0, 100, -200])
def test_damaged_pickles_are_told(tmp_path, cut):
    source = pickled(tiny.llama(tmp_path / "source"))
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:cut] if cut else b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*damaged"):
        read_source(source)


def test_an_index_names_files_in_its_folder_alone(tmp_path):
    source = pickled(tiny.llama(tmp_path / "source"), files=2)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read_source(source)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "nowhere.bin"}}))
    with pytest.raises(ValueError, match=r"not there \(nowhere\.bin\)"):
        read_source(source)


def test_safetensors_go_first(tmp_path):
    source = tiny.llama(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps("anything"))
    assert read_source(source).kind == "folder"
