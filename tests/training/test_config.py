import pytest

from t2r.training.recipe import as_dict, load_config, save_config, stages_of

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


STAGES = """
batch_size: 3
optim: {lr: 1e-4}
loss: {temperature: 2}
stages:
  - {stage: align, tokens: 9000, trains: gates, optim: {lr: 2e-3}}
  - {stage: distill, loss: {cross_entropy: 0.2, top_k: 8}}
  - {stage: finetune, steps: 4, sequence_length: 64, batch_size: 1}
"""


def test_stages_take_from_the_top_what_they_leave_out(tmp_path):
    config = load_config(write(tmp_path, GOOD + STAGES), ["stages.2.steps=7", "optim.gate_lr=5e-3"])
    align, distill, finetune = stages_of(config)
    assert [s.stage for s in (align, distill, finetune)] == ["align", "distill", "finetune"]
    assert (align.steps, align.tokens, distill.steps, finetune.steps) == (None, 9000, 5, 7)
    assert (align.trains, distill.trains) == ("gates", "lora")
    assert (align.optim.lr, distill.optim.lr, align.optim.gate_lr) == (2e-3, 1e-4, 5e-3)
    weights = [(s.loss.align, s.loss.distill, s.loss.cross_entropy) for s in (align, distill, finetune)]
    assert weights == [(1, 0, 0), (0, 1, 0.2), (0, 0, 1)]
    assert [s.loss.temperature for s in (align, distill, finetune)] == [2, 2, 2]
    assert distill.loss.top_k == 8
    assert (distill.sequence_length, finetune.sequence_length) == (1024, 64)
    assert (distill.batch_size, finetune.batch_size) == (3, 1)
    save_config(config, tmp_path / "saved.yaml")
    assert stages_of(load_config(tmp_path / "saved.yaml")) == stages_of(config)


def test_without_stages_there_is_one(tmp_path):
    (stage,) = stages_of(load_config(write(tmp_path, GOOD), ["loss.distill=0", "loss.cross_entropy=1"]))
    assert (stage.stage, stage.steps, stage.loss.cross_entropy) == ("finetune", 5, 1)


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
        (GOOD, ["optim.eps=0"], "optim.eps must be greater than 0"),
        (GOOD, ["loss.temperature=0"], "must be positive"),
        (GOOD, ["loss.align=1"], "loss.align goes with no other loss"),
        (GOOD, ["loss.top_k=0"], "loss.top_k must be at least 1"),
        (GOOD, ["loss.direction=back"], "loss.direction must be one of forward, reverse, got 'back'"),
        (GOOD, ["trains=all"], "trains must be one of lora, gates, full, got 'all'"),
        (GOOD, ["steps=null"], "steps or tokens: give one of them"),
        (GOOD, ["tokens=100"], "steps or tokens: give one of them"),
        (GOOD + STAGES, ["stages.0.stage=aling"], r"stages.0.stage must be one of align, distill, finetune, got"),
        (GOOD + STAGES, ["stages.0.step=3"], "Key 'step' not in 'StageConfig'. Did you mean"),
        (GOOD + STAGES, ["loss.cross_entropy=0.3"], r"config.yaml: the weights of loss .* belong into the stages"),
        (GOOD, ["eval.every=5"], "eval.every has no effect without eval.text"),
        (GOOD + STAGES, ["stages.3.steps=3"], "index out of range"),
        (GOOD + STAGES, ["stages.1.trains=full"], "stages.1.trains: full does not go with lora at the top"),
        (GOOD + STAGES, ["stages.1.steps=0"], "stages.1.steps must be at least 1, got 0"),
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
