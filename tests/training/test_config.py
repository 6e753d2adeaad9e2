import pytest

from t2r.training.config import as_dict, load_config, save_config

GOOD = "model: m\noutput: o\nsteps: 5\ndata: {files: [a.txt]}\n"


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["optim.lr=1e-5", "data.files=[b.txt,c.txt]", "steps=7"])
    assert config.optim.lr == 1e-5  # plain YAML reads 1e-5 as a string
    assert config.data.files == ["b.txt", "c.txt"]
    assert config.steps == 7


def test_saved_is_loaded(tmp_path):
    config = load_config(write(tmp_path, GOOD + "loss: {cross_entropy: 0.5}"))
    save_config(config, tmp_path / "saved.yaml")
    assert as_dict(load_config(tmp_path / "saved.yaml")) == as_dict(config)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD + "modle: x", [], "Key 'modle' not in 'TrainConfig'. Did you mean: 'model'?"),
        (GOOD + "optim: {gate_rl: 1}", [], r"Did you mean: 'gate_lr'\? \(at optim.gate_rl\)"),
        (GOOD, ["lora.rank=3"], r"Key 'rank' not in .* \(at lora.rank\)"),
        (GOOD, ["optim.lr=fast"], r"'fast' .* \(at optim.lr\)"),
        (GOOD, ["steps"], "'steps' is not of the form key=value"),
        (GOOD, ["steps=0"], "steps must be at least 1, got 0"),
        (GOOD, ["lora.r=0"], "lora.r must be at least 1"),
        (GOOD, ["data.files=[]"], "names no file"),
        (GOOD, ["data.sequence_length=1"], "at least 2"),
        (GOOD, ["loss.distill=0"], "nothing to learn"),
        (GOOD, ["loss.distill=-1"], "must not be negative"),
        (GOOD, ["loss.temperature=0"], "must be positive"),
        (GOOD, ["dtype=half"], "auto, float32 or bfloat16"),
        ("output: o", [], "mandatory value: model"),
        ("- a\n- b", [], "not a YAML mapping|merge"),
        ("a: [", [], "not a YAML mapping"),
    ],
)
def test_mistakes_are_one_clear_line(text, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_config(write(tmp_path, text), overrides)
    assert "config.yaml" in str(error.value) or "override" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
