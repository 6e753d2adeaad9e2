"""README, recipes and code say the same."""

import re
from pathlib import Path

import pytest
import typer

from t2r.cli.main import app
from t2r.training import load_config

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
    assert not re.search(r"@[A-Z]+@|TODO|FIXME", README)


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


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid(recipe):
    assert load_config(recipe).steps > 0
