"""Each command over its library: options arrive, results go to stdout, notes to stderr."""

import json
import sys
import types
import warnings

import pytest
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from typer.testing import CliRunner

from t2r.cli.main import app
from t2r.evaluation import evaluate_perplexity
from tests.conversion import gsa
from tests.tiny import WORDS, tiny_llama, tiny_t2r, tiny_text, tiny_tokenizer, write_record

runner = CliRunner()


@pytest.fixture(autouse=True)
def process_settings(monkeypatch):
    """What the application sets for its process is taken back; its effect on progress bars comes too late here."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    disable_progress_bar()
    yield
    enable_progress_bar()


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def fails(*arguments):
    """The one line that a command says when it refuses."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(100))
    return path


def test_perplexity_as_json(tmp_path, text):
    student, teacher = tiny_t2r(tmp_path / "student"), tiny_llama(tmp_path / "teacher", seed=1)
    options = (
        "--text",
        text,
        "--teacher",
        tmp_path / "teacher",
        "--window",
        40,
        "--limit",
        1,
        "--device",
        "cpu",
        "--json",
    )
    result = run("eval", "ppl", tmp_path / "student", *options)
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    tokenizer = tiny_tokenizer(tmp_path)
    expected = evaluate_perplexity(student, tokenizer, text.read_text(), teacher=teacher, window=40, limit=1)
    assert list(measured) == ["windows", "tokens", "student", "teacher", "ratio", "bands"]
    for figure in ("student", "teacher", "ratio"):
        assert measured[figure] == pytest.approx(expected.as_dict()[figure], rel=1e-5)
        assert measured["bands"][0][figure] == measured[figure]
    assert (measured["windows"], measured["tokens"]) == (1, 39)


def test_perplexity_without_a_teacher(tmp_path, text):
    tiny_t2r(tmp_path / "student")
    result = run("eval", "ppl", tmp_path / "student", "--text", text, "--window", 40, "--batch-size", 2, "--json")
    content = json.loads(result.stdout)
    assert content["windows"] == 2
    assert content["teacher"] is content["ratio"] is content["bands"][0]["teacher"] is None
    table = run("eval", "ppl", tmp_path / "student", "--text", text, "--window", 40).stdout
    assert f"{content['student']:,.2f}" in table
    assert "teacher" not in table


def test_perplexity_refuses_bad_texts_and_models(tmp_path, text):
    tiny_t2r(tmp_path / "student")
    command = ("eval", "ppl", tmp_path / "student", "--text")
    assert "the text has 100 tokens, less than one window of 1024" in fails(*command, text)
    assert "no such text file" in fails(*command, tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8, byte 0xe9 at offset 3" in fails(*command, tmp_path / "latin.txt")
    assert "dtype 'int4' is unknown" in fails(*command, text, "--window", 50, "--dtype", "int4")
    assert "none: no such folder" in fails("eval", "ppl", tmp_path / "none", "--text", text)
    assert "none: no such folder" in fails(*command, text, "--window", 50, "--teacher", tmp_path / "none")


def test_eval_layers(tmp_path):
    tiny_t2r(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(200))
    command = ("eval", "layers", tmp_path / "model", "--text", text, "--window", 40)
    found = json.loads(run(*command, "--keep", 1, "--json").stdout)
    best = max(found["gains"], key=found["gains"].get)
    assert found["keep"] == [int(best)]
    assert found["gain"] == found["gains"][best]
    assert f"--keep-softmax {best} gains {found['gain']:.4f}" in run(*command, "--keep", 1).stdout
    tiny_llama(tmp_path / "source")
    assert "a llama model; convert it first" in fails("eval", "layers", tmp_path / "source", *command[3:])
    write_record(tmp_path / "model", training={})
    assert "was trained" in fails(*command)


def test_generate_streams_text_and_says_what_it_took(tmp_path):
    model = tiny_t2r(tmp_path)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    result = run("generate", tmp_path, "--prompt", "the cat", "--max-new-tokens", 7)
    assert result.exit_code == 0, result.output
    assert set(result.stdout.split()) <= set(WORDS)
    assert "2 tokens of prompt, 7 new" in result.stderr
    assert "tokens/s, state of 2.0 KiB" in result.stderr
    assert 4 * model.config.state_elements() == 2048
    assert "no chat template" in fails("generate", tmp_path, "--prompt", "the cat", "--chat")
    assert "no effect" in run("generate", tmp_path, "--prompt", "the cat", "--seed", 1).stderr


def test_sampling_options_arrive(tmp_path):
    tiny_t2r(tmp_path)
    command = ("generate", tmp_path, "--prompt", "the", "--temperature", 2.0, "--top-p", 0.9, "--seed")
    first, again, other = (run(*command, seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_convert_writes_a_model(tmp_path):
    tiny_llama(tmp_path / "source")
    options = ("--slots", 16, "--sinks", 2, "--keep-softmax", "1", "--gate-write", 5, "--gate-keep", 6)
    command = ("convert", tmp_path / "source", "-o", tmp_path / "out", *options)
    planned = run(*command, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "out").exists()
    assert json.loads(planned.stdout)["num_slots"] == 16
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert f"written to {tmp_path / 'out'}; shards: 1 " in result.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention"]
    assert (config["num_sinks"], config["gate_write_logit"], config["gate_keep_logit"]) == (2, 5, 6)
    assert "exists" in fails(*command)
    again = run(*command, "--overwrite", "--hard-link", "--verify")
    assert again.exit_code == 0, again.output
    assert "shards: 1 linked, 1 written" in again.stderr
    assert "verified on 512 tokens" in again.stderr


def test_convert_with_a_window(tmp_path):
    tiny_llama(tmp_path / "source")
    command = ("convert", tmp_path / "source", "-o", tmp_path / "out", "--start", "window")
    assert run(*command, "--window", 5).exit_code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["layer_types"], config["hybrid_window"]) == (["hybrid_sliding"] * 2, 5)
    assert "5 tokens" in run("inspect", tmp_path / "out").stdout
    assert "hybrid_window must be at least 1, got -1" in fails(*command, "--overwrite", "--window", -1)


def test_convert_with_slots_by_layer(tmp_path):
    tiny_llama(tmp_path / "source")
    command = ("convert", tmp_path / "source", "-o", tmp_path / "out", "--start", "window", "--slots-by-layer")
    assert "6 to 12 (mean 9.0) slots" in run(*command, "6,12").stdout
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_slots"], config["slots_by_layer"]) == (9, [6, 12])
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["slots_in_words"] == "6 to 12 (mean 9.0)"
    assert run(*command, "even", "--slots", "8", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["slots_by_layer"] is None
    assert run(*command, "6,8/16", "--overwrite").exit_code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_slots"], config["slots_by_layer"]) == (9, [6, [8, 16]])
    assert "6 to 16" in run("inspect", tmp_path / "out").stdout
    for wrong in ("6,a", "6,8/a", "6,,8", "6,8/"):
        assert f"--slots-by-layer '{wrong}'" in fails(*command, wrong)
    assert "slots_by_layer gives a layer slots for 3 heads" in fails(*command, "6,8/8/9")
    assert "slots_by_layer 'some' is unknown" in fails(*command, "some")


def test_models_of_flash_linear_attention_in_and_out(tmp_path):
    source = gsa.write(tmp_path / "source", gsa.CONFIG, gsa.weights(gsa.CONFIG))
    result = run("convert", source, "-o", tmp_path / "out", "--from", "fla")
    assert result.exit_code == 0, result.output
    assert "Gated Slot Attention, paper start, 6 slots" in result.stdout
    assert "KV cache" not in result.stdout
    assert "--verify compares softmax attention" in fails("convert", source, "-o", tmp_path / "x", "--verify")
    result = run("export", tmp_path / "out", "-o", tmp_path / "back", "--to", "fla")
    assert result.exit_code == 0, result.output
    assert f"written to {tmp_path / 'back'}" in result.stderr
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "gsa"
    assert "exists already" in fails("export", tmp_path / "out", "-o", tmp_path / "back", "--to", "fla")
    assert "--to 'x' is unknown; use fla" in fails("export", tmp_path / "out", "-o", tmp_path / "b", "--to", "x")
    tiny_llama(tmp_path / "llama")
    assert "a llama model" in fails("convert", tmp_path / "llama", "-o", tmp_path / "x", "--from", "fla")


@pytest.mark.parametrize("layers", ["a", "0;1", "0,,1"])
def test_convert_refuses_layers_that_are_no_numbers(tmp_path, layers):
    assert f"--keep-softmax {layers!r}" in fails("convert", "x", "-o", tmp_path / "out", "--keep-softmax", layers)


@pytest.fixture
def training(monkeypatch):
    """Stands for t2r.training, and keeps the calls."""
    module = types.ModuleType("t2r.training")
    module.calls = []
    module.run = lambda *args, **kwargs: module.calls.append(("run", [*map(str, args)], kwargs))
    module.merge = lambda *args, **kwargs: module.calls.append(("merge", [*map(str, args)], kwargs))
    module.leave_the_others = lambda: module.calls.append(("leave_the_others",))
    monkeypatch.setitem(sys.modules, "t2r.training", module)
    monkeypatch.setattr("t2r.training", module, raising=False)
    return module.calls


def test_train_passes_its_arguments_on(training):
    assert run("train", "recipe.yaml", "steps=3", "lora.rank=8", "--resume").exit_code == 0
    assert run("train", "recipe.yaml", "--overwrite").exit_code == 0
    assert training == [
        ("run", ["recipe.yaml", "['steps=3', 'lora.rank=8']"], {"resume": True, "overwrite": False}),
        ("leave_the_others",),
        ("run", ["recipe.yaml", "[]"], {"resume": False, "overwrite": True}),
        ("leave_the_others",),
    ]


def test_merge_passes_its_arguments_on(training):
    result = run("merge", "runs/x", "-o", "out", "--overwrite")
    assert result.exit_code == 0
    assert training == [("merge", ["runs/x", "out"], {"base": None, "overwrite": True})]
    assert "written to out" in result.stderr


def test_inspect(tmp_path):
    model = tiny_t2r(tmp_path)
    write_record(tmp_path, conversion={"source": "someone/llama-tiny"}, training={"tokens": 123})
    facts = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert facts["state_bytes"] == 4 * model.config.state_elements()
    assert facts["record"]["training"] == {"tokens": 123}
    shown = run("inspect", tmp_path).stdout
    for expected in ("8, 2 of them sinks", f"{facts['parameters']:,}", "32,768", "someone/llama-tiny", "123"):
        assert expected in shown


def test_push_dry_run_shows_files_and_card(tmp_path):
    tiny_t2r(tmp_path)
    result = run("push", tmp_path, "me/tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    for expected in ("model.safetensors", "README.md", "pipeline_tag: text-generation", "# tiny"):
        assert expected in result.stdout
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "optimizer.pt").touch()
    assert "holds training state (optimizer.pt)" in fails("push", tmp_path, "me/tiny", "--dry-run")


def test_env():
    facts = json.loads(run("env", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["backend"] in ("torch", "triton")
    assert len(facts["cuda"]) == torch.cuda.device_count()
    assert torch.__version__ in run("env").stdout


@pytest.mark.parametrize(("size", "bytes_"), [("500", 500), ("2KB", 2000), ("1.5 MiB", 3 * 2**19), ("5gb", 5 * 10**9)])
def test_sizes_of_shards(size, bytes_):
    from t2r.cli.convert import _size

    assert _size(size) == bytes_


def test_shards_of_no_size_are_told(tmp_path):
    tiny_llama(tmp_path / "source")
    command = ("convert", tmp_path / "source", "-o", tmp_path / "out", "--start", "window", "--max-shard-size")
    assert "give a size like 500MB or 5GB" in fails(*command, "big")
    assert "give a size like 500MB or 5GB" in fails(*command, "0GB")
    assert run(*command, "20KB", "--dtype", "bfloat16").exit_code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
