"""The recovery benchmark's recipes can be read and planned."""

from inspect import signature
from pathlib import Path

import pytest
import yaml

import t2r_conversion
from t2r.training import load_config

RECIPES = sorted((Path(__file__).parent.parent / "benchmarks" / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_read(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    assert recipe.keys() <= {"convert", "train"}
    assert recipe["convert"].keys() <= signature(t2r_conversion.convert).parameters.keys()
    if "train" in recipe:
        content = {"model": "converted", "output": "run", **recipe["train"]}
        content["data"] = {"files": ["corpus.jsonl"], **content.get("data", {})}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
        load_config(tmp_path / "train.yaml")
