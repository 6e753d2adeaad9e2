"""README, recipes and code say the same."""

import re
import warnings
from pathlib import Path

import pytest
import typer

from t2r.cli.main import app
from t2r.model import T2RConfig
from t2r.training import load_config, plan_run
from t2r.training.stages import plan_stages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = typer.main.get_command(app)


def test_the_table_names_every_command():
    named = set(re.findall(r"^\| `t2r (\w+)", README, re.M))
    assert named == set(COMMAND.commands)


def test_every_option_in_the_readme_exists():
    for line in re.findall(r"^(?:\| `|    )(t2r .*)$", README, re.M):
        words = line.split(" #")[0].replace("`", " ").replace("[", " ").replace("]", " ").split()
        command = COMMAND.commands[words[1]]
        if words[1] == "eval":
            command = command.commands[words[2]]
        known = {name for parameter in command.params for name in parameter.opts}
        used = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert used <= known, line


def test_nothing_is_left_to_fill_in():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text(encoding="utf-8")), page.name


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_layout_lists_the_folders():
    listed = {name.split("/")[0] for name in re.findall(r"^\| `([\w/]+)/`", README, re.M)}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    made_by_use = {"runs", "build", "t2r.egg-info"}
    assert folders - made_by_use == listed


SHAPES = {  # of the models that the recipes are for
    "quickstart": (576, 1536, 9, 3, 64, 49152, 30, True),
    "smollm2-135m": (576, 1536, 9, 3, 64, 49152, 30, True),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64, 128256, 16, True),
    "mistral-7b": (4096, 14336, 32, 8, 128, 32768, 32, False),
}


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_can_be_planned(recipe, tmp_path):
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("vocab_size", "num_hidden_layers", "tie_word_embeddings")
    T2RConfig(**dict(zip(names, SHAPES[recipe.stem], strict=True)), start="routed").save_pretrained(tmp_path)
    plan = plan_run(load_config(recipe, [f"model={tmp_path}"]), on_cuda=True)
    stages = plan.as_dict()["stages"]
    named = [s["stage"] for s in stages]
    assert named in (["1-distill"], ["1-distill", "2-distill"], ["1-align", "2-distill", "3-finetune"])
    limit = {"mistral-7b": 24, "llama-3.2-1b": 8}.get(recipe.stem)
    assert limit is None or max(s["memory_bytes"] for s in stages) < 0.9 * limit * 2**30  # as the recipe says


def test_eight_gpus_get_past_the_warm_up(tmp_path):
    (overrides,) = re.findall(r"--num_processes 8 -m t2r\.train examples/mistral-7b\.yaml (.*)", README)
    config = load_config(ROOT / "examples" / "mistral-7b.yaml", overrides.split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eight, one = plan_stages(config, 8), plan_stages(load_config(ROOT / "examples" / "mistral-7b.yaml", []), 1)
    assert [stage.tokens_per_step for stage in eight[:2]] == [stage.tokens_per_step for stage in one[:2]]
