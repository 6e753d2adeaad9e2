"""The summary of measured figures: every target names a row, and what is missed is called missed."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="Python 3.11")


def test_judgement():
    from benchmarks import summary

    target = {"required": 2.0, "aim": 1.0}
    assert [summary.judge({"ours": x}, target) for x in (0.9, 1.5, 2.1)] == ["aim", "required", "missed"]
    assert summary.judge({"ours": 3.0}, {"required": 2.0, "more": True}) == "required"
    assert summary.judge({"ours": 3.0, "peer": 2.0}, {"required": 1.6, "of": "peer", "more": True}) == "missed"
    assert summary.judge({"ours": 3.0}, {}) == ""


def test_every_target_is_of_a_measured_row(capsys):
    import tomllib

    from benchmarks import summary

    wanted = tomllib.loads((summary.HERE / "targets.toml").read_text(encoding="utf-8"))
    for benchmark, targets in wanted.items():
        content = json.loads(Path(summary.HERE / "results" / f"{benchmark}.json").read_text(encoding="utf-8"))
        assert targets.keys() <= {row["name"] for row in content["rows"]}
        assert all(isinstance(row["ours"], int | float) for row in content["rows"])
    summary.main()
    assert "forward/8x2048" in capsys.readouterr().out


def test_the_table_of_configurations_is_written_as_it_is_read(tmp_path):
    pytest.importorskip("triton")
    from benchmarks import tune_operator

    table = json.loads(tune_operator.TABLE.read_text(encoding="utf-8"))
    tune_operator.write(table, tmp_path / "configs.json")
    assert (tmp_path / "configs.json").read_text() == tune_operator.TABLE.read_text()
    assert all(set(c) >= {"num_warps", "num_stages"} for c in tune_operator.candidates("states", half=True))
    assert min(c["BS"] for c in tune_operator.candidates("gates", half=False)) * 4 == 128
