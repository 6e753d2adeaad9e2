"""A pushed model, fetched from the Hub by processes of their own: with transformers alone, and with t2r."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.hub.loopback import TOKEN, loopback
from tests.tiny import tiny_t2r, tiny_text, write_record

PROMPT = tiny_text(20)
LOAD = f"""
import sys
sys.modules.update(dict.fromkeys(["t2r", "t2r_kernels", "t2r_conversion", "peft"]))  # as if not installed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/tiny", revision="v1", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/tiny", revision="v1", trust_remote_code=True)
ids = tokenizer({PROMPT!r}, return_tensors="pt")["input_ids"]
save_file({{"ids": ids, "logits": model(ids).logits.detach()}}, sys.argv[1])
"""


def run(hub, folder, *words, token=TOKEN):
    """A Python command in a process that knows no other Hub."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_TOKEN": token, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-P", *map(str, words)], capture_output=True, text=True, env=env, cwd=folder)


def t2r(hub, folder, *words, **options):
    return run(hub, folder, "-m", "t2r.cli.main", *words, **options)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A model, the folder around its own, and the private repository that `t2r push` has made of it."""
    folder = tmp_path_factory.mktemp("pushed")
    model = tiny_t2r(folder / "model", start="routed")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    write_record(folder / "model", conversion={"source": "someone/llama-tiny", "license": "mit"})
    with loopback() as hub:
        options = ("--private", "--revision", "v1", "-m", "First")
        done = t2r(hub, folder, "push", folder / "model", "me/tiny", *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{hub.url}/me/tiny/commit/{hub.repos['me/tiny'].commit('v1').oid}\n"
        t2r(hub, folder, "push", folder / "model", "me/tiny")
        yield model, folder, hub


def test_push_takes_its_options_over(pushed):
    repo = pushed[2].repos["me/tiny"]
    assert repo.private
    assert repo.commit("v1").title == "First"
    assert repo.commit("main").files == repo.commit("v1").files


def test_transformers_alone_loads_it(pushed):
    model, folder, hub = pushed
    done = run(hub, folder, "-c", LOAD, folder / "said.safetensors")
    assert done.returncode == 0, done.stderr
    said = load_file(folder / "said.safetensors")
    with torch.no_grad():
        assert torch.equal(said["logits"], model(said["ids"]).logits)


def test_t2r_generates_from_it(pushed):
    _, folder, hub = pushed
    words = ("--prompt", PROMPT, "--max-new-tokens", 8)
    fetched, local = (t2r(hub, folder, "generate", source, *words) for source in ("me/tiny", folder / "model"))
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout == local.stdout
    assert fetched.stdout.strip()


def test_its_record_comes_along(pushed):
    _, folder, hub = pushed
    read = "import sys, json; from t2r.evaluation.loading import record_of; print(json.dumps(record_of(sys.argv[1])))"
    done = run(hub, folder, "-c", read, "me/tiny")
    assert json.loads(done.stdout) == json.loads((folder / "model" / "t2r_record.json").read_text()), done.stderr


def test_nobody_else_sees_a_private_model(pushed, tmp_path):
    _, _, hub = pushed
    done = t2r(hub, tmp_path, "generate", "me/tiny", "--prompt", "the", token="hf_other")
    assert done.returncode == 2
    assert "me/tiny: no such folder, and no such model on the Hub; for a private one: hf auth login" in done.stderr
