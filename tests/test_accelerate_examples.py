"""The example configurations are what accelerate reads."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parent.parent / "examples" / "accelerate"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_is_read(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert "-m t2r.train RECIPE.yaml" in path.read_text()
