"""Kinds of documents, and which of their tokens are learnt."""

import itertools
import json

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from t2r.training import run
from t2r.training.config import DataConfig
from t2r.training.data import PackedRows, Tokens, collate, tokenise
from t2r.training.documents import sources_of
from tests.training.tiny import save_tokenizer, workspace

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' }}{{ m.content }} </s>{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learnt(tokens, tokenizer):
    """All words, those that are learnt in capitals."""
    learn = [True] * len(tokens.ids) if tokens.learn is None else tokens.learn
    words = tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    return " ".join(word.upper() if wanted else word for word, wanted in zip(words, learn, strict=True))


def say(role, content):
    return {"role": role, "content": content}


def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": "sat on"})
    assert learnt(tokenise(DataConfig(files=[file]), tokenizer), tokenizer) == "the cat SAT ON </S>"


def test_of_a_chat_what_the_assistant_says_is_learnt(tmp_path, tokenizer):
    turns = [say("user", "the cat"), say("assistant", "sat"), say("user", "on"), say("assistant", "a mat")]
    file = write(tmp_path / "a.jsonl", {"messages": turns})
    expected = "<unk> the cat </s> <unk> SAT </S> <unk> on </s> <unk> A MAT </S>"
    assert learnt(tokenise(DataConfig(files=[file]), tokenizer), tokenizer) == expected
    file = write(tmp_path / "b.jsonl", {"prompt": turns[:3], "completion": turns[3:]})
    expected = "<unk> the cat </s> <unk> sat </s> <unk> on </s> <unk> A MAT </S>"
    assert learnt(tokenise(DataConfig(files=[file]), tokenizer), tokenizer) == expected


def test_a_chat_may_begin_with_the_assistant_and_rows_may_be_empty(tmp_path, tokenizer):
    rows = [{"messages": [say("assistant", "the cat"), say("user", "sat")]}, {"messages": []}, {"messages": None}]
    tokens = tokenise(DataConfig(files=[write(tmp_path / "a.jsonl", *rows)]), tokenizer)
    assert learnt(tokens, tokenizer) == "<UNK> THE CAT </S> <unk> sat </s>"
    rows = [{"prompt": "the", "completion": "cat"}, {"prompt": "the", "completion": None}]
    tokens = tokenise(DataConfig(files=[write(tmp_path / "b.jsonl", *rows)]), tokenizer)
    assert learnt(tokens, tokenizer) == "the CAT </S>"


def test_kinds_mix_and_a_column_makes_text_of_any(tmp_path, tokenizer):
    row = {"prompt": "the cat", "completion": "sat", "text": "a mat"}
    files = [write(tmp_path / "a.jsonl", row), {"path": str(tmp_path / "a.jsonl"), "column": "text"}]
    assert learnt(tokenise(DataConfig(files=files), tokenizer), tokenizer) == "the cat SAT </S> A MAT </S>"


def test_a_prompt_does_not_end_the_document(tmp_path, tokenizer):
    """Though a tokenizer ends whatever it is given."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    row = {"prompt": "the cat", "completion": "sat"}
    tokens = tokenise(DataConfig(files=[write(tmp_path / "a.jsonl", row)]), tokenizer)
    assert learnt(tokens, tokenizer) == "the cat SAT </S>"


@pytest.mark.parametrize(("weight", "count"), [(1, 8), (2, 16), (0.5, 4), (1.25, 10)])
def test_weights_are_passes(tmp_path, tokenizer, weight, count):
    path = write(tmp_path / "a.jsonl", *({"text": "the cat sat " * i} for i in range(1, 9)))
    tokens = tokenise(DataConfig(files=[{"path": path, "weight": weight}]), tokenizer)
    assert len(tokens.bounds) == count + 1
    assert len(set((tokens.bounds[1:] - tokens.bounds[:-1]).tolist())) == min(8, count)


def test_a_limit(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"text": "the cat"}, {"text": "sat"}, {"text": "on"})
    tokens = tokenise(DataConfig(files=[{"path": path, "limit": 2}]), tokenizer)
    assert learnt(tokens, tokenizer) == "THE CAT </S> SAT </S>"


def test_a_hub_dataset_and_only_as_much_as_is_wanted(tmp_path, tokenizer, monkeypatch):
    import datasets
    from huggingface_hub import HfApi

    rows = datasets.Dataset.from_dict({"text": ["the cat", "sat", "on"]})
    asked = []

    def load_dataset(*args, streaming=False, **kwargs):
        asked.append((args, kwargs, streaming))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_: type("Info", (), {"sha": "abc"}))
    whole = tokenise(DataConfig(files=["some/dataset"]), tokenizer)
    assert learnt(whole, tokenizer) == "THE CAT </S> SAT </S> ON </S>"
    part = {"path": "some/dataset", "name": "small", "split": "test", "limit": 1}
    assert learnt(tokenise(DataConfig(files=[part]), tokenizer), tokenizer) == "THE CAT </S>"
    assert asked == [
        (("some/dataset", None), {"split": "train", "revision": None}, False),
        (("some/dataset", "small"), {"split": "test", "revision": None}, True),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": [say("user", "the cat")]}], "nothing to learn"),
        ([{"prompt": "the", "completion": [say("assistant", "cat")]}], "a.jsonl: prompt and completion are both"),
        ([{"body": "the cat"}], "no column 'text'; it has body.*messages or prompt and completion"),
    ],
)
def test_what_cannot_be_learnt(tmp_path, tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        tokenise(DataConfig(files=[write(tmp_path / "a.jsonl", *rows)]), tokenizer)


def test_chats_want_a_template_that_grows(tmp_path, tokenizer):
    turns = [say("user", "the"), say("assistant", "cat"), say("user", "sat"), say("assistant", "on")]
    file = write(tmp_path / "a.jsonl", {"messages": turns})
    tokenizer.chat_template = "{{ messages | length }} " + TEMPLATE
    with pytest.raises(ValueError, match="writes earlier turns anew"):
        tokenise(DataConfig(files=[file]), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        tokenise(DataConfig(files=[file]), tokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"path": "a.txt", "wieght": 2}], r"data.files.0: Key 'wieght' not in 'SourceConfig'. Did you mean: 'weight'"),
        (["a.txt", {"path": "b.txt", "weight": 0}], "data.files.1: weight must be positive"),
        ([{"weight": 2}], "path"),
        ([], "names no file"),
    ],
)
def test_mistakes_in_sources(files, message):
    with pytest.raises(ValueError, match=message):
        sources_of(DataConfig(files=files))


def test_rows_without_anything_to_learn_are_left_out():
    import numpy as np

    learn = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1], dtype=bool)
    tokens = Tokens(np.arange(12, dtype=np.int32), np.array([0, 12]), learn)
    rows = PackedRows(tokens, 4)
    assert [rows[i]["row"] for i in range(len(rows))] == [2]  # the only target of row 1 is its first token
    assert collate([rows[0]])["labels"].tolist() == [[-100, -100, 10, 11]]
    with pytest.raises(ValueError, match="no row of 4 tokens has anything to learn"):
        PackedRows(Tokens(tokens.ids[:8], np.array([0, 8]), learn[:8]), 4)


def test_a_run_on_completions(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    config = workspace(tmp_path)
    rows = [{"prompt": "the cat sat on", "completion": "a mat and saw some dogs"} for _ in range(30)]
    file = write(tmp_path / "pairs.jsonl", *rows)
    record = run(config, [f"data.files=[{file}]", "loss.distill=0", "loss.cross_entropy=1", "steps=25"])
    assert record["history"][-1]["loss"] < 0.5 * record["history"][0]["loss"]
    assert record["training"]["data"] == ["pairs.jsonl"]


def test_a_documents_loss_is_the_same_alone_and_packed(tmp_path, monkeypatch):
    """Each document's targets, summed, whether other documents share its row or not."""
    import numpy as np

    from t2r.training.adapters import add_adapters
    from t2r.training.config import LoraConfig, LossConfig
    from t2r.training.objective import chunked_loss, token_loss
    from t2r.training.teachers import OwnTeacher
    from tests.model.tiny import shake, student
    from tests.model.tiny import teacher as tiny_teacher

    model = add_adapters(student(tiny_teacher()), LoraConfig(r=2))
    shake(model)
    loss = token_loss(LossConfig(distill=0.5, cross_entropy=0.5))

    def of(ids, bounds):
        rows = PackedRows(Tokens(np.array(ids, dtype=np.int32), np.array(bounds)), len(ids))
        batch = collate([rows[0]])
        inputs = {"input_ids": batch["input_ids"], "cu_seqlens": batch["cu_seqlens"]}
        with OwnTeacher().active(model) as base:
            reference = base(**inputs, skip_logits=True, use_cache=False).hidden_states[0]
        hidden = model(**inputs, skip_logits=True, use_cache=False).hidden_states[0]
        return chunked_loss(model.get_base_model().lm_head, hidden, batch["labels"], reference, loss).item()

    torch.manual_seed(0)
    ids, cuts = torch.randint(0, 60, (70,)).tolist(), [0, 9, 40, 70]
    alone = sum(of(ids[a:b], [0, b - a]) for a, b in itertools.pairwise(cuts))
    assert of(ids, cuts) == pytest.approx(alone, rel=1e-4)
    assert of(ids, [0, 70]) != pytest.approx(alone, rel=1e-2)
