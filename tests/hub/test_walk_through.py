"""docs/hub.md, word for word, on a tiny model that a Hub on this machine has under the name of a large one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.hub.loopback import TOKEN, Commit, Repo, loopback
from tests.tiny import tiny_llama, tiny_text

PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
RECIPE = """
data: {files: [train.jsonl], sequence_length: 64}
lora: {r: 4}
eval: {text: heldout.txt, window: 64, limit: 2}
steps: 2
"""
# Runs each command or piece of Python that it is given, in one process.
RUN = """
import json, shlex, sys
from typer.testing import CliRunner
from t2r.cli.main import app

for step in json.load(sys.stdin):
    if step.startswith("t2r "):
        result = CliRunner().invoke(app, shlex.split(step)[1:])
        assert result.exit_code == 0, (step, result.output, result.exception)
        print(result.stdout)
    else:
        exec(step, {})
"""


def steps_of(page):
    """Commands and Python of a page, in order, without the login."""
    found = re.findall(r"^    (t2r [^\n]*)$|^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [command or python for command, python in found]


def test_the_walk_through(tmp_path):
    name = "mistralai/Mistral-7B-v0.3"
    tiny_llama(tmp_path / "teacher")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    files["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    documents = [tiny_text(40 + 10 * i, seed=i) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "heldout.txt").write_text(tiny_text(300, seed=99))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "mistral-7b.yaml").write_text(RECIPE)
    steps = steps_of(PAGE)
    assert [shlex.split(step)[1] for step in steps if step.startswith("t2r ")] == [
        *("convert", "train", "merge", "push", "push", "generate", "push", "merge"),
    ]
    with loopback() as hub:
        hub.repos[name] = Repo(False, {"main": [Commit("first", files, "")]})
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "T2R_"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        env |= {"T2R_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", RUN],
            input=json.dumps(steps), capture_output=True, text=True, env=env, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    model, adapter = hub.files("you/Mistral-7B-GSA"), hub.files("you/Mistral-7B-GSA-adapter")
    assert model["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert hub.repos["you/Mistral-7B-GSA"].commit("main").title == "First version"
    for card in (model["README.md"].decode(), adapter["README.md"].decode()):
        assert f"base_model: {name}" in card
        assert "license: apache-2.0" in card
    merged, again = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in ("merged", "again"))
    assert merged == again
