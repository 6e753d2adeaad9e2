"""All commands one after another on a tiny model, as a user would run them."""

import json

import pytest
from typer.testing import CliRunner

from t2r.cli.main import app
from tests.tiny import tiny_llama, tiny_text

RECIPE = """
model: {folder}/converted
output: {folder}/run
data: {{files: [{folder}/train.jsonl], sequence_length: 64}}
lora: {{r: 4}}
optim: {{lr: 5e-3, gate_lr: 5e-2}}
eval: {{text: {folder}/heldout.txt, window: 64, limit: 4}}
steps: 20
"""


def t2r(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("start", "window"), [("window", None), ("routed", None), ("paper", None), ("window", 3), ("routed", 3)]
)
def test_the_whole_way(tmp_path, monkeypatch, start, window):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    tiny_llama(tmp_path / "teacher", chat=True)
    documents = [tiny_text(40 + 10 * i, seed=i) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "heldout.txt").write_text(tiny_text(300, seed=99))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))

    slots = ["--slots", 8] if start == "paper" else ["--slots", 8, "--sinks", 2]
    if start == "routed":
        monkeypatch.setattr("t2r_conversion.calibrate.WINDOW", 128)
        slots += ["--calibrate", tmp_path / "heldout.txt"]
    slots += [] if window is None else ["--window", window]
    t2r("convert", tmp_path / "teacher", "-o", tmp_path / "converted", "--start", start, *slots)
    tables = t2r("train", tmp_path / "recipe.yaml")
    assert "Perplexity before the finetune" in tables
    assert "Perplexity after the finetune" in tables
    t2r("merge", tmp_path / "run", "-o", tmp_path / "merged")

    text = ["--text", tmp_path / "heldout.txt", "--window", 64, "--limit", 4, "--json"]
    measured = json.loads(t2r("eval", "ppl", tmp_path / "merged", *text, "--teacher", tmp_path / "teacher"))
    recorded = json.loads((tmp_path / "merged" / "t2r_record.json").read_text())["evaluation"]
    assert measured["teacher"] == pytest.approx(recorded["after"]["teacher"], rel=1e-4)
    assert measured["student"] == pytest.approx(recorded["after"]["student"], rel=1e-3)
    assert recorded["after"]["ratio"] < recorded["before"]["ratio"]

    assert t2r("generate", tmp_path / "merged", "--prompt", "the cat sat", "--max-new-tokens", 5, "--no-chat").strip()
    facts = json.loads(t2r("inspect", tmp_path / "merged", "--json"))
    assert facts["start"] == start
    card = t2r("push", tmp_path / "merged", "someone/tiny", "--dry-run")
    assert "model.safetensors" in card
    assert f"{recorded['after']['student']:.2f}" in card
    assert str(tmp_path) not in card
