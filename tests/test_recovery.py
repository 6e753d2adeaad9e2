"""What the recovery benchmark derives and reports."""

import gzip
import json

import pytest
import torch

from benchmarks import recovery, recovery_report
from tests.model.tiny import student, tokens


def row(name, tokens, ratio, far, seed=0, **more):
    bands = {"0-63": 1.0, "512-1023": far}
    about = {"unit": "ratio", "seed": seed, "tokens": tokens, "bands": bands, "bands_4096": bands, "ratio_4096": ratio}
    about |= {"state_bytes": 2**20, "train_minutes": 1.0, "memory": None, "windows": 64}
    return {"name": name, "ours": ratio, "recipe": {"convert": {"num_slots": 64}}} | about | more


ROWS = [
    row("control64_4M", 4_014_080, 1.5, 2.0),
    row("slots64_4M", 4_014_080, 1.2, 1.5),
    row("slots64_4M", 4_014_080, 1.3, 1.6, seed=1),
    row("slots64_0", 0, 1.4, 1.6, memory=[[10.0, 20.0], [30.0, 40.0]]),
]


def test_margin_over_the_control():
    found = {each["name"]: each["ours"] for each in recovery.derived(ROWS)}
    assert found == {"short_context": 1.0, "control_margin_512": 0.25}
    assert recovery.derived(ROWS[:1]) == []


def test_excerpts_are_of_all_sources_alike():
    rows = [{"source": s, "text": s * (2000 + 2000 * i)} for s in "ab" for i in range(12)] + [
        {"source": "c", "text": "c"}
    ]
    found = recovery.excerpts(rows)
    assert {len(text) for text in found} == {recovery.EXCERPT}
    assert sorted(text[0] for text in found) == ["a"] * recovery.EXCERPTS + ["b"] * recovery.EXCERPTS
    assert found == recovery.excerpts(rows)


def test_corpus_is_there_whole_and_by_source(tmp_path):
    rows = [{"source": s, "text": s * 7000} for s in "abab"]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(row) + "\n" for row in rows)
    work = tmp_path / "work"
    recovery.prepare(tmp_path, work)
    for name, expected in (("corpus", rows), ("sources/a", rows[::2])):
        assert [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()] == expected
    assert recovery.files_of({}, work) == [{"path": str(work / "corpus.jsonl")}]
    files = ["corpus.jsonl", {"path": "sources/a.jsonl", "weight": 0.5}]
    expected = [{"path": str(work / "corpus.jsonl")}, {"path": str(work / "sources/a.jsonl"), "weight": 0.5}]
    assert recovery.files_of({"data": {"files": files}}, work) == expected


def test_rows_are_named_by_their_recipes(tmp_path):
    assert recovery.name_of(tmp_path / "mine.yaml") == "mine"
    assert recovery.name_of(recovery.RECIPES / "slots64_4M.yaml") == "slots64_4M"
    assert recovery.name_of(recovery.RECIPES / "slots64_0" / "even.yaml") == "slots64_0/even"


def test_memory_is_the_age_of_what_slots_hold():
    model, windows = student(start="routed"), tokens(2, 60)
    ages = recovery.memory(model, windows)
    with torch.no_grad():
        held = [model(x[None]).past_key_values.layers[1].groups[0].held.positions[0, :, 2:] for x in windows]
    expected = torch.stack([59 - positions.double().mean(-1) for positions in held]).mean(0)
    assert ages[1] == pytest.approx(expected.tolist(), abs=0.06)
    assert recovery.memory(student(), windows) is None
    many, few = recovery.memory(student(start="routed", slots_by_layer=[[40, 8], 16, 16]), windows)[0]
    assert many > few


def test_report_holds_every_run_and_mean_of_seeds(tmp_path):
    (tmp_path / "recovery.json").write_text(json.dumps({"rows": ROWS + recovery.derived(ROWS)}))
    page = tmp_path / "recovery.md"
    page.write_text(f"before\n\n{recovery_report.BEGIN}\nold\n{recovery_report.END}\n\nafter\n")
    recovery_report.write(tmp_path / "recovery.json", page, tmp_path / "pictures")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| slots64_4M | 4.0M | 2 | 1.250 ± 0.050 |" in text
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"tokens.png", "positions.png", "memory.png"}


def test_the_page_is_up_to_date(tmp_path):
    page = tmp_path / "recovery.md"
    page.write_text(recovery_report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    recovery_report.write(recovery_report.ROWS, page, tmp_path)
    assert page.read_text(encoding="utf-8") == recovery_report.PAGE.read_text(encoding="utf-8")
