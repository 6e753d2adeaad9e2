"""Saved models as transformers alone loads them: with the code that they bring along, in processes of their own."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2r.model.export import AUTO_MAP, code_files
from tests.tiny import tiny_t2r, tiny_text

ROOT = Path(__file__).parents[2]
MODELS = {
    "window": {},
    "paper": {"start": "paper"},
    "routed": {"start": "routed", "slots_by_layer": [6, [12, 8]]},
    "with-softmax.layer": {"start": "routed", "layer_types": ["linear_attention", "full_attention"]},
}
OTHERS = ["t2r", "t2r_kernels", "t2r_conversion", "accelerate", "datasets", "gguf", "omegaconf", "peft", "triton"]
PROMPT = tiny_text(30)

# Loads each folder given, saves it, loads that, and keeps what both say.
LOAD = """
import sys
sys.modules.update(dict.fromkeys({blocked}))  # as if not installed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer({prompt!r}, return_tensors="pt")["input_ids"]
    said = {{}}
    for round, path in enumerate((folder, folder + "-again")):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        said[f"logits{{round}}"] = model(ids).logits.detach()
        said[f"tokens{{round}}"] = model.generate(ids, max_new_tokens=20, do_sample=False)
        model.save_pretrained(path + "-again")
    save_file(said, folder + "/said.safetensors")
    print(type(model).__module__, sys.modules[type(model).__module__].gsa.__module__)
"""


def load_elsewhere(folders, blocked, cache):
    """Load and save folders in a process without some packages; returns, per folder, where class and kernels are."""
    env = os.environ | {"HF_MODULES_CACHE": str(cache), "PYTHONPATH": ":".join(sys.path)}
    script = LOAD.format(blocked=blocked, prompt=PROMPT)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *map(str, folders)], capture_output=True, text=True, env=env, cwd=cache
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of all kinds in folders, loaded by a process without anything of ours."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: tiny_t2r(folder / name, seed=1, **options) for name, options in MODELS.items()}
    for model in made.values():
        for name, buffer in model.named_buffers():
            if "router" in name:
                buffer.normal_(generator=torch.Generator().manual_seed(2))
        model.save_pretrained(folder / next(key for key, value in made.items() if value is model))
    sources = load_elsewhere([folder / name for name in made], OTHERS, tmp_path_factory.mktemp("modules"))
    return folder, made, sources


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_the_same_without_t2r(models, name):
    folder, made, _ = models
    said = load_file(folder / name / "said.safetensors")
    ids = said["tokens0"][:, : len(PROMPT.split())]
    with torch.no_grad():
        logits = made[name](ids).logits
    tokens = made[name].generate(ids, max_new_tokens=20, do_sample=False)
    for time in "01":
        assert torch.equal(said[f"logits{time}"], logits)
        assert torch.equal(said[f"tokens{time}"], tokens)
    assert tokens.shape[1] > ids.shape[1]


def test_nothing_of_ours_was_there(models):
    for module, kernels in models[2]:
        assert module.startswith("transformers_modules.")
        assert kernels.startswith("transformers_modules.")


def test_what_is_saved_without_t2r_is_what_t2r_saves(models):
    folder, made, _ = models
    for name in made:
        for file, text in code_files().items():
            assert (folder / f"{name}-again-again" / file).read_text() == text
        config = json.loads((folder / f"{name}-again-again" / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP


def test_with_t2r_installed_its_own_class_is_loaded(models, tmp_path):
    folder = models[0] / "window"
    before = load_file(folder / "said.safetensors")
    assert load_elsewhere([folder], [], tmp_path) == [["t2r.model.modeling_t2r", "t2r_kernels.api"]]
    after = load_file(folder / "said.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for file, text in code_files().items():
        assert (models[0] / "window-again-again" / file).read_text() == text


def test_installed_kernels_are_taken_before_the_bundled_ones(models, tmp_path):
    [[module, kernels]] = load_elsewhere([models[0] / "routed"], ["t2r", "t2r_conversion"], tmp_path)
    assert module.startswith("transformers_modules.")
    assert kernels == "t2r_kernels.api"


def test_the_code_is_what_the_package_runs():
    files = code_files()
    for folder, prefix in ((ROOT / "t2r" / "model", ""), (ROOT / "kernels" / "t2r_kernels", "t2r_kernels_")):
        for source in folder.glob("*.py"):
            if source.name != "__init__.py":
                ours, theirs = source.read_text().splitlines(), files[prefix + source.name].splitlines()
                changed = [line for line in ours if line not in theirs]
                assert all("t2r_kernels" in line for line in changed), (source, changed)


def test_the_code_stands_by_itself():
    files = code_files()
    for name, text in files.items():
        tree = ast.parse(text)
        tried = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in node.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, name
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("t2r"):
                assert node in tried, name
